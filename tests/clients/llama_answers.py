"""Runs in the environment that has xllamacpp: what llama.cpp reads and answers, as JSON.

usage: llama_answers.py REQUEST.json ANSWERS.json

The request: model and lora (files), max_new_tokens; prompts (token ids) to continue greedily; chats (messages),
each laid out by the model's own chat template and tokenized as llama-server does it; talk: whether to answer these too.
"""

from __future__ import annotations

import json
import sys
import urllib.request
from pathlib import Path
from typing import Any

import xllamacpp


def main() -> None:
    request = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    params = xllamacpp.CommonParams()
    params.model.path = request["model"]
    params.n_ctx, params.n_parallel, params.n_gpu_layers, params.warmup, params.verbosity = 2048, 1, 0, False, 0
    if request["lora"]:
        adapter = xllamacpp.CommonAdapterLoraInfo()
        adapter.path, adapter.scale = request["lora"], 1.0
        params.lora_adapters = [adapter]
    server = xllamacpp.Server(params)
    answers = {
        "answers": [answer(server, ids, request["max_new_tokens"]) for ids in request["prompts"]],
        "chats": [read(server.listening_address, messages) for messages in request["chats"]],
        "said": [talk(server, messages) for messages in request["chats"] if request["talk"]],
    }
    Path(sys.argv[2]).write_text(json.dumps(answers), encoding="utf-8")


def answer(server: Any, ids: list[int], max_new_tokens: int) -> dict[str, Any]:
    settings = {"temperature": 0.0, "n_probs": 5, "n_predict": max_new_tokens}
    reply = server.handle_completions({"prompt": ids, **settings})["choices"][0]
    content = (reply.get("logprobs") or {}).get("content") or []  # none where the first token ends the answer
    return {
        "ids": [token["id"] for token in content],
        "text": reply["text"],
        "first": {str(token["id"]): token["logprob"] for entry in content[:1] for token in entry["top_logprobs"]},
    }


def read(address: str, messages: list[dict[str, str]]) -> list[int]:
    """The ids of a chat: the start token is added by the tokenizer where the file says so."""
    prompt = post(f"{address}/apply-template", {"messages": messages})["prompt"]
    tokens: list[int] = post(f"{address}/tokenize", {"content": prompt, "add_special": True, "parse_special": True})[
        "tokens"
    ]
    return tokens


def talk(server: Any, messages: list[dict[str, str]]) -> str:
    """The answer of an OpenAI client that says nothing but the messages: template and end tokens are the file's."""
    reply = server.handle_chat_completions({"messages": messages, "temperature": 0.0, "max_tokens": 64})
    text: str = reply["choices"][0]["message"]["content"]
    return text


def post(address: str, body: dict[str, Any]) -> Any:
    request = urllib.request.Request(address, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as reply:
        return json.load(reply)


if __name__ == "__main__":
    main()
