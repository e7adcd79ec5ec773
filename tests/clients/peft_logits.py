"""Runs in an environment with torch, transformers and peft and nothing of ours: logits of base + adapter.

usage: peft_logits.py REQUEST.json LOGITS.safetensors
REQUEST: {"base": folder, "adapter": folder, "messages": [[...], ...]}; for each conversation the file gets its prompt's
ids, as the tokenizer beside the adapter gives them, and the float32 logits at every place of it [T, V].
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    assert importlib.util.find_spec("espalier") is None, "espalier is in the client's environment"
    request = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    tokenizer = AutoTokenizer.from_pretrained(request["adapter"])
    base = AutoModelForCausalLM.from_pretrained(request["base"], dtype=torch.float32)
    model = PeftModel.from_pretrained(base, request["adapter"]).eval()
    found = {}
    for number, messages in enumerate(request["messages"]):
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            found[f"logits.{number}"] = model(input_ids=ids).logits[0].float().contiguous()
        found[f"ids.{number}"] = ids[0]
    save_file(found, sys.argv[2])


if __name__ == "__main__":
    main()
