"""Runs in an environment with the openai package and nothing of ours: what it gets from a server, as JSON.

usage: openai_answers.py BASE_URL API_KEY MODEL ANSWERS.json
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import openai

MESSAGES = [{"role": "user", "content": "a pear"}]


def main() -> None:
    assert importlib.util.find_spec("espalier") is None, "espalier is in the client's environment"
    url, key, model, answers = sys.argv[1:]
    client = openai.OpenAI(base_url=url, api_key=key, max_retries=0)
    asked = {"model": model, "messages": MESSAGES, "max_tokens": 24, "temperature": 0}
    whole = client.chat.completions.create(**asked)
    streamed = client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    chunks = [chunk.model_dump() for chunk in streamed]
    # An answer as the package gives it goes back as a turn, with its empty fields.
    again = [*MESSAGES, whole.choices[0].message.model_dump(), {"role": "user", "content": "and?"}]
    found = {
        "version": openai.__version__,
        "models": [model.id for model in client.models.list()],
        "whole": whole.model_dump(),
        "chunks": chunks,
        "second": client.chat.completions.create(model=model, messages=again, max_tokens=4).model_dump(),
        "errors": {
            "model": said(lambda: client.chat.completions.create(model="fig", messages=MESSAGES)),
            "field": said(lambda: client.chat.completions.create(model=model, messages=MESSAGES, n=2)),
            "key": said(lambda: openai.OpenAI(base_url=url, api_key="other", max_retries=0).models.list()),
        },
    }
    Path(answers).write_text(json.dumps(found), encoding="utf-8")


def said(ask: object) -> list[str | None]:
    """[class, message, param] of the error that the package makes of a refusal."""
    try:
        ask()
    except openai.APIStatusError as error:
        return [type(error).__name__, error.body["message"], error.param]
    raise AssertionError("not refused")


if __name__ == "__main__":
    main()
