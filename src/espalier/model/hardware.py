"""Device and precision: facts of the machine, each with the reason that is printed."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def choose_device(use_cpu: bool = False) -> tuple[str, str]:
    """(device, reason): the accelerator that PyTorch sees, else the CPU."""
    import torch

    if use_cpu:
        return "cpu", "asked for with --use_cpu"
    if torch.cuda.is_available():
        return "cuda", torch.cuda.get_device_name()
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if found is not None:
        return found.type, f"PyTorch sees a device of kind {found.type}"
    return "cpu", "PyTorch sees no accelerator"


def choose_dtype(device: str, requested: str | None = None) -> tuple[torch.dtype, str]:
    """(dtype of the base weights, reason). `requested` is "bf16", "fp16", "fp32" or None for the best.

    A precision that the hardware does not multiply fast gives way to the best there is, and the reason says so.
    float16 is only ever chosen on accelerators and needs a gradient scaler; adapters stay float32 in every case.
    """
    import torch

    best, reason = _best_dtype(device)
    if requested is None:
        return best, reason
    wanted = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[requested]
    if wanted in (best, torch.float32) or (device != "cpu" and _has(device, wanted)):
        return wanted, f"asked for with --{requested}"
    return best, f"--{requested} is not fast on this hardware: {reason}"


def _best_dtype(device: str) -> tuple[torch.dtype, str]:
    import torch

    if device.startswith("cuda"):
        major, minor = torch.cuda.get_device_capability(device)
        if _has(device, torch.bfloat16):
            return torch.bfloat16, f"this GPU (compute capability {major}.{minor}) multiplies bf16 fast"
        return torch.float16, f"this GPU (compute capability {major}.{minor}) has no fast bf16; fp16 with a scaler"
    if device == "cpu":
        if _cpu_has("_is_amx_tile_supported"):
            return torch.bfloat16, "this CPU multiplies bf16 fast (AMX)"
        if _cpu_has("_is_avx512_bf16_supported"):
            return torch.bfloat16, "this CPU multiplies bf16 fast (AVX512_BF16)"
        return torch.float32, "this CPU multiplies float32 best"
    return torch.float32, f"lower precisions are not measured on {device}"


def _has(device: str, dtype: torch.dtype) -> bool:
    """bf16 is fast from compute capability 8 (Ampere) on; fp16 on every CUDA device; other devices: as asked."""
    import torch

    if device.startswith("cuda") and dtype == torch.bfloat16:
        return torch.cuda.get_device_capability(device)[0] >= 8
    return True


def _cpu_has(name: str) -> bool:
    """Ask PyTorch about a CPU feature; these functions are private and may be absent in another version."""
    import torch

    ask = getattr(torch.cpu, name, None)
    return bool(ask is not None and ask())
