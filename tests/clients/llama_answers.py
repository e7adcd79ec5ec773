"""Runs in the environment that has xllamacpp: prompts as token ids through a GGUF model, greedy tokens out, as JSON.

usage: llama_answers.py REQUEST.json ANSWERS.json
"""

from __future__ import annotations

import json
import sys
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
    answers = []
    for ids, text in zip(request["prompts"], request["texts"], strict=True):
        settings: dict[str, Any] = {"temperature": 0.0, "n_probs": 5}
        settings["n_predict"] = request["max_new_tokens"]
        reply = server.handle_completions({"prompt": ids, **settings})["choices"][0]
        content = reply["logprobs"]["content"]
        read = server.handle_completions({"prompt": text, "n_predict": 1})["usage"]["prompt_tokens"]
        answers.append(
            {
                "ids": [token["id"] for token in content],
                "first": {str(token["id"]): token["logprob"] for token in content[0]["top_logprobs"]},
                "prompt_tokens": read,
            }
        )
    Path(sys.argv[2]).write_text(json.dumps(answers), encoding="utf-8")


if __name__ == "__main__":
    main()
