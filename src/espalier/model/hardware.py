"""Device, precision and memory: facts of the machine, each with the reason that is printed."""

from __future__ import annotations

import ctypes
import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from espalier.errors import UsageError

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


# Memory of graphics cards by the names they are sold under, in GiB.
CARDS = {
    "T4": 16, "RTX 3060": 12, "RTX 3090": 24, "RTX 4090": 24, "RTX 5090": 32, "L4": 24, "L40S": 48, "A10": 24,
    "A100": 80, "A6000": 48, "V100": 16, "H100": 80, "H200": 141,
}  # fmt: skip
CARD_SHARE = 0.94  # what a CUDA context, its kernels and the caching allocator's blocks leave to tensors


def parse_bytes(text: str, *, where: str) -> int:
    """Bytes of "8GB", "7.5 GiB", "900MB". Raises UsageError for anything else."""
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([KMGT])(i?)B?\s*", text, re.IGNORECASE)
    if match is None or float(match[1]) == 0:
        raise UsageError(f"{text!r} is no amount of memory", where=where, todo="Write it as 8GB or 7.5GiB.")
    power = "KMGT".index(match[2].upper()) + 1
    return int(float(match[1]) * (1024 if match[3] else 1000) ** power)


def device_memory(text: str) -> tuple[str, int]:
    """(name, usable bytes) of a card: "A10", "A10 24GB" or any name with a size. Raises UsageError."""
    name, _, size = text.strip().rpartition(" ")
    if re.fullmatch(r"[0-9.]+\s*[GT]i?B", size, re.IGNORECASE):
        return name or text, int(parse_bytes(size.upper().replace("GB", "GiB"), where="--device") * CARD_SHARE)
    for card, gib in CARDS.items():
        if card.lower() == text.strip().lower():
            return card, int((gib << 30) * CARD_SHARE)
    raise UsageError(
        f"{text!r} is not among the cards known here",
        where="--device",
        details=[", ".join(CARDS)],
        todo='Name its memory: --device "NAME 24GB".',
    )


def resident_bytes(*, peak: bool = False) -> int:
    """Memory of this process that is in RAM now, or the most since `reset_peak`."""
    name = "VmHWM" if peak else "VmRSS"
    for line in _lines("/proc/self/status"):
        if line.startswith(name):
            return int(line.split()[1]) << 10
    import resource

    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else used << 10


def data_bytes() -> int:
    """Private memory of this process by the count that RLIMIT_DATA bounds (Linux): mapped, touched or not."""
    return next((int(line.split()[1]) << 10 for line in _lines("/proc/self/status") if line.startswith("VmData")), 0)


def release_free_memory() -> None:
    """Give what the C library keeps for later back to the system, where it is glibc: it would count as resident, and
    small tensors in it keep large ones from fitting."""
    if sys.platform.startswith("linux"):
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


KERNELS_KEPT = 384  # more than the shapes of a large pack (230 were counted), or kernels would be made anew each layer
KERNEL_CACHES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")  # oneDNN's own, and PyTorch's over it


def keep_few_kernels() -> None:
    """Let oneDNN keep KERNELS_KEPT kernels, unless the environment says otherwise.

    It makes one for each shape of a product, and packs differ in length. By itself it keeps 1,024: a gigabyte (LOG.md).
    To be called before the first product of the process.
    """
    for name in KERNEL_CACHES:
        os.environ.setdefault(name, str(KERNELS_KEPT))


def reset_peak() -> bool:
    """Begin a new peak of `resident_bytes`; False where the system does not do that."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def memory_here(device: str) -> int:
    """Bytes that this process could take more on `device`: free memory of the card, or available RAM."""
    if device.startswith("cuda"):
        import torch

        return int(torch.cuda.mem_get_info()[0])
    for line in _lines("/proc/meminfo"):
        if line.startswith("MemAvailable:"):
            available = int(line.split()[1]) << 10
            return min([available, *_group_rest()])
    return int(os.sysconf("SC_PHYS_PAGES")) * int(os.sysconf("SC_PAGE_SIZE"))


def _group_rest() -> list[int]:
    """What a control group (a container) still allows; empty where there is no limit."""
    for limit, used in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        values = [*_lines(limit)[:1], *_lines(used)[:1]]
        if len(values) == 2 and all(value.strip().isdigit() for value in values):
            return [max(0, int(values[0]) - int(values[1]))]
    return []


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return []
