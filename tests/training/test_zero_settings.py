"""--deepspeed: what the engine is given of the file, and what of it is refused, without DeepSpeed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from espalier.errors import UsageError
from espalier.runfile import build_config
from espalier.training import zero_settings
from espalier.training.zero_settings import engine_settings


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """told(file, **options): the engine's settings in one of two processes, with a DeepSpeed that is installed."""
    for name, value in {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(zero_settings, "find_spec", lambda name: object())
    path = tmp_path / "ds.json"

    def settings(given: Any, **options: Any) -> Any:
        path.write_text(given if isinstance(given, str) else json.dumps(given), encoding="utf-8")
        return engine_settings(build_config({"deepspeed": str(path), "per_device_train_batch_size": 4, **options}))

    return settings


def refusal(told: Any, given: Any, **options: Any) -> str:
    with pytest.raises(UsageError) as refused:
        told(given, **options)
    return str(refused.value)


def test_without_the_option_there_is_no_engine() -> None:
    assert engine_settings(build_config({})) is None


def test_what_the_engine_is_given(told: Any) -> None:
    zero = {"stage": 3, "overlap_comm": True, "stage3_prefetch_bucket_size": 7, "reduce_bucket_size": "auto"}
    assert told({"zero_optimization": zero}, max_grad_norm=0.5) == {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": 0.5,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {
            "memory_efficient_linear": False,
            "stage": 3,
            "overlap_comm": True,
            "stage3_prefetch_bucket_size": 7,
        },
    }


def test_a_file_whose_values_are_auto_or_the_flags_own_is_taken(told: Any) -> None:
    given = {
        "fp16": {"enabled": "auto", "loss_scale": 0, "initial_scale_power": 16},
        "bf16": {"enabled": True},
        "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0}},
        "scheduler": {"type": "WarmupDecayLR", "params": {"total_num_steps": "auto", "warmup_num_steps": "auto"}},
        "zero_optimization": {
            "stage": 2,
            "offload_optimizer": {"device": "none", "pin_memory": True},
            "allgather_bucket_size": 5e8,
        },
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": 1.0,
        "train_batch_size": 16,
        "train_micro_batch_size_per_gpu": 4,
        "wall_clock_breakdown": False,
        "zero_allow_untested_optimizer": True,
    }
    found = told(given, bf16=True, adam_beta2=0.95, gradient_accumulation_steps=2)
    assert found["zero_optimization"] == {"memory_efficient_linear": False, "stage": 2, "allgather_bucket_size": 5e8}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"train_batch_size": 16}, "train_batch_size: 16, but batch size x accumulation x processes says 8; write 8"),
        ({"gradient_clipping": 0.3}, 'gradient_clipping: 0.3, but --max_grad_norm says 1.0; write 1.0 or "auto"'),
        ({"optimizer": {"type": "Adam"}}, "optimizer.type: 'Adam', but --optim adamw_torch_fused says 'AdamW'"),
        ({"optimizer": {"params": {"lr": 3e-4}}}, "optimizer.params.lr: 0.0003, but --learning_rate says 0.0001"),
        ({"optimizer": {"params": {"betas": [0.9, 0.98]}}}, "betas: [0.9, 0.98], but --adam_beta1, --adam_beta2 says"),
        ({"scheduler": {"type": "WarmupLR"}}, "scheduler.type: 'WarmupLR', but --lr_scheduler_type says 'linear'"),
        ({"scheduler": {"params": {"warmup_num_steps": 9}}}, "scheduler.params.warmup_num_steps: 9, but"),
        ({"bf16": {"enabled": True}}, "bf16.enabled: True, but --bf16 says False"),
        ({"fp16": {"enabled": True}}, "fp16.enabled: True is not supported"),
        ({"steps_per_print": 10}, "steps_per_print: changes nothing here"),
        ({"wall_clock_breakdown": True}, "wall_clock_breakdown: True is not supported; false is taken"),
        ({"activation_checkpointing": {"cpu_checkpointing": True}}, "activation_checkpointing.cpu_checkpointing: chan"),
        ({"zero_optimization": {"stage": 1}}, "zero_optimization.stage: 1; 2 (gradients, optimizer state) and 3"),
        ({"zero_optimization": {"stage": True}}, "zero_optimization.stage: True"),
        ({"zero_optimization": 2}, "zero_optimization: missing"),
        ({"zero_optimization": {"stage": 2, "stage3_prefetch_bucket_size": 9}}, "changes nothing with stage 2"),
        ({"zero_optimization": {"stage": 3, "allgather_partitions": True}}, "changes nothing with stage 3"),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}}, "offload_param.device: 'cpu' is not"),
        (
            {"zero_optimization": {"stage": 3, "offload_param": {"pin_memory": True}}},
            "machine's memory is not supported",
        ),
        (
            {"zero_optimization": {"stage": 3, "zero_quantized_weights": True}},
            "zero_quantized_weights: unknown, or not",
        ),
        (
            {"zero_optimization": {"stage": 3, "stage3_gather_16bit_weights_on_model_save": False}},
            'stage3_gather_16bit_weights_on_model_save: False is not supported; true or "auto" is taken',
        ),
    ],
)
def test_what_the_file_may_not_say(given: dict[str, Any], said: str, told: Any) -> None:
    text = refusal(told, {"zero_optimization": {"stage": 2}, **given})
    assert said in text
    assert text.count("\n  - ") == 1, text


def test_all_that_is_wrong_is_told_at_once(told: Any) -> None:
    text = refusal(told, {"steps_per_print": 1, "gradient_clipping": 2, "zero_optimization": {"stage": 0}})
    assert [line.split(":")[0] for line in text.splitlines() if line.startswith("  - ")] == [
        "  - zero_optimization.stage",
        "  - gradient_clipping",
        "  - steps_per_print",
    ]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"load_in_4bit": True}, "--load_in_4bit: a quantized base under ZeRO is not supported here"),
        ({"load_in_8bit": True}, "--load_in_8bit: a quantized base under ZeRO is not supported here"),
        ({"fsdp": True}, "--fsdp: both say how the base lies on the processes"),
        ({"fp16": True}, "--fp16: its gradient scaler"),
        ({"optim": "adafactor"}, "--optim adafactor: ZeRO steps on flat pieces"),
        ({"streaming": True, "max_steps": 3}, "--streaming: the self-check needs all rows at hand"),
    ],
)
def test_options_that_do_not_go_with_it(options: dict[str, Any], said: str, told: Any) -> None:
    assert said in refusal(told, {"zero_optimization": {"stage": 2}}, **options)


@pytest.mark.parametrize(("text", "said"), [("{", "ds.json cannot be read"), ("[]", "this is no JSON object")])
def test_a_file_that_is_none(text: str, said: str, told: Any) -> None:
    assert said in refusal(told, text)


def test_one_process_has_nothing_to_share(told: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK")
    assert "one process: there is nobody to share with" in refusal(told, {"zero_optimization": {"stage": 2}})


def test_where_deepspeed_is_missing_the_message_says_how_to_install_it(
    told: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(zero_settings, "find_spec", lambda name: None)
    text = refusal(told, {"zero_optimization": {"stage": 2}})
    assert "DeepSpeed is not installed" in text
    assert "pip install 'espalier-lm[deepspeed]'" in text
