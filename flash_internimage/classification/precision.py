"""Mixed precision."""

import contextlib

import torch

AMP_DTYPES = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def resolve_amp(amp: str, device: torch.device) -> str:
    """Return the mixed-precision mode to use: 'fp16', 'bf16' or 'off'.

    'auto' selects the published fp16 on CUDA and bf16 on CPUs with bfloat16 instructions. It is
    'off' elsewhere, as other CPUs are many times slower in 16 bits than in float32.

    Raises:
        ValueError: If there is no such mode.
    """
    if amp in AMP_DTYPES:
        return amp
    if amp != "auto":
        raise ValueError(f"amp must be 'auto' or one of {', '.join(AMP_DTYPES)}, got {amp!r}")
    if device.type == "cpu" and has_bf16_instructions():
        return "bf16"
    return "fp16" if device.type == "cuda" else "off"


def has_bf16_instructions() -> bool:
    """Return whether the CPU has bfloat16 instructions (AVX-512 BF16 or AMX)."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def autocast(device: torch.device, amp: str) -> contextlib.AbstractContextManager:
    """Return the autocast context of a mixed-precision mode, a key of `AMP_DTYPES`."""
    dtype = AMP_DTYPES[amp]
    if dtype is None:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=dtype)
