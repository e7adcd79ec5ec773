"""Small random models of every family, under every kind of tokenizer: llama.cpp reads our ids and says our tokens.

Gemma's own tokenizers cannot be had here; one of its kind (sentencepiece's BPE with bytes for what is missing, no blank
in front) is built.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from test_llama_cpp import ask
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

from espalier.encode.template import resolve_template
from espalier.model.load import load_model, load_tokenizer
from espalier.model.load_adapter import load_adapter
from espalier.use.export import export_gguf
from espalier.use.generate import generate
from espalier.use.probes import prompt_ids

pytestmark = pytest.mark.clients
NUM_TOKENS = 8
ASSETS = Path(__file__).parents[2] / ".assets"
TURNS = ("def f(x):\n    return x\n", "1 + 1 = 2.", "你好 🙂 café", "ok", " x\n\ny")
CHATS = [
    [{"role": "user", "content": "Hello there,  two blanks"}],
    [{"role": "assistant" if i % 2 else "user", "content": text} for i, text in enumerate(TURNS)],
]
LLAMA2 = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else 'user') "
    "+ '\n' + m['content'] + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)


@pytest.fixture(scope="session")
def xllamacpp_python(client_python: Any) -> Path:
    return client_python("xllamacpp", "xllamacpp")


def gemma_like(folder: Path) -> None:
    """About 400 tokens: specials, bytes, the letters, and words joined pair by pair as sentencepiece would."""
    names = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]
    letters = sorted({c for chat in CHATS for m in chat for c in m["content"] if c.isascii()} | set("usermodl\u2581"))
    letters = [c for c in letters if c != " "]
    texts = [*names, "\n\n", *(f"<0x{byte:02X}>" for byte in range(256)), *letters]
    words = ["th", "he", "\u2581t", "the", "\u2581the", "\u2581\u2581", "er", "ll", "llo", "el", "ello"]
    words += ["re", "ret", "return", "urn", "ur", "rn", "tu", "turn"]
    words = [word for word in dict.fromkeys(words) if word not in texts]
    vocabulary = {text: i for i, text in enumerate([*texts, *words])}
    merges = [
        (word[:cut], word[cut:])
        for word in words
        for cut in range(1, len(word))
        if word[:cut] in vocabulary and word[cut:] in vocabulary
    ]
    made = Tokenizer(models.BPE(vocabulary, merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    made.normalizer = normalizers.Replace(" ", "\u2581")
    made.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    made.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    made.add_tokens([AddedToken("\n\n", special=False, normalized=False)])
    made.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<bos>", eos_token="<eos>", unk_token="<unk>", pad_token="<pad>"
    )
    fast.chat_template = GEMMA
    fast.save_pretrained(folder)


def give_tokenizer(folder: Path, kind: str, shared: Path) -> None:
    if kind == "gemma":
        gemma_like(folder)
    else:
        source = shared / "tiny-llama" if kind == "bytes" else ASSETS / f"tokenizer-{kind.partition('-')[0]}"
        if not source.is_dir():
            pytest.skip("scripts/fetch_test_assets.py has not been run")
        tokenizer = load_tokenizer(source)
        if kind.endswith("-atom"):
            resolve_template(tokenizer, "atom")
        elif kind.startswith("llama2"):
            tokenizer.chat_template = LLAMA2
        tokenizer.save_pretrained(folder)


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        ("Llama", "bytes"),
        ("Llama", "llama2"),
        ("Llama", "llama2-atom"),
        ("Mistral", "llama2"),
        ("Qwen2", "qwen3"),
        ("Qwen3", "qwen3"),
        ("Gemma", "gemma"),
        ("Gemma2", "gemma"),
        ("Gemma3", "gemma"),
    ],
)
def test_ids_and_next_tokens(xllamacpp_python: Path, shared: Path, tmp_path: Path, family: str, kind: str) -> None:
    base, adapter = tmp_path / "base", tmp_path / "a"
    give_tokenizer(base, kind, shared)
    make_base(base, family, rows=-(-len(load_tokenizer(base)) // 8) * 8)
    tokenizer = load_tokenizer(base)  # transformers reads a tokenizer otherwise beside another family's config
    model = loaded(base)
    torch.manual_seed(6)
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=4, init_lora_weights=False))
    adapted.save_pretrained(adapter)
    chats = CHATS if kind != "bytes" else [[{"role": "user", "content": "a pear"}]]
    prompts = [prompt_ids(tokenizer, resolve_template(tokenizer), chat) for chat in chats]
    live = load_adapter(loaded(base), adapter)
    ours = generate(live, tokenizer, prompts, max_new_tokens=NUM_TOKENS, stop_ids=[])
    # One token after each beginning of our answer: where two are as likely, one slip would change all that follow.
    begun = [[*ids, *answer.ids[:cut]] for ids, answer in zip(prompts, ours, strict=True) for cut in range(NUM_TOKENS)]
    export_gguf(adapter, tmp_path / "g", str(base), "f32")
    theirs = ask(xllamacpp_python, tmp_path, tmp_path / "g" / "model-f32.gguf", None, begun, chats, max_new_tokens=1)
    assert theirs["chats"] == prompts
    off = [compared(live, ids, answer["first"]) for ids, answer in zip(begun, theirs["answers"], strict=True)]
    wanted = [i for answer in ours for i in answer.ids]
    # llama-server names no token that ends the answer, nor a byte that is no whole character.
    same = [answer["ids"][0] == i for answer, i in zip(theirs["answers"], wanted, strict=True) if answer["ids"]]
    print(f"{family} {kind}: {sum(same)} of {len(same)} next tokens, log-probabilities {max(off):.4f} apart at most")
    assert len(wanted) == NUM_TOKENS * len(chats)
    assert len(same) >= 0.8 * len(wanted)
    assert sum(same) >= 0.95 * len(same)
    assert max(off) < 0.02  # llama.cpp keeps keys and values in 16 bits


def compared(live: Any, ids: list[int], theirs: dict[str, float]) -> float:
    """Largest difference of the next token's log-probability over those that llama.cpp names."""
    with torch.no_grad():
        log_probs = live(input_ids=torch.tensor([ids])).logits[0, -1].float().log_softmax(-1)
    return max((abs(float(log_probs[int(token)]) - value) for token, value in theirs.items()), default=0.0)


def loaded(folder: Path) -> Any:
    return load_model(folder, device="cpu", dtype=torch.float32)


def make_base(folder: Path, family: str, rows: int) -> None:
    settings: dict[str, Any] = {"vocab_size": rows, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    settings |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}
    settings |= {"head_dim": 16} if family != "Qwen2" else {}
    if family in ("Gemma2", "Gemma3"):
        layers = {"num_hidden_layers": 8} if family == "Gemma3" else {}
        settings |= {"query_pre_attn_scalar": 16, "sliding_window": 12, **layers}
    name = "Gemma3Text" if family == "Gemma3" else family
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    assert tokenizer["eos_token"]
    torch.manual_seed(5)
    config = getattr(transformers, f"{name}Config")(**settings)
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.add_(torch.randn_like(tensor) * 0.1)
    model.save_pretrained(folder)
