"""Devices and dtypes as a user names them."""

from __future__ import annotations

import torch

from m2d_embed.backends import selection
from m2d_embed.errors import ConfigError, UnsupportedError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "int8": torch.int8}


def parse_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """``"fp32"``, ``"bf16"``, ``"fp16"``, torch's names for them, or the torch.dtype itself.

    Raises:
        ConfigError: on anything else.
    """
    names = DTYPES | {str(known).removeprefix("torch."): known for known in DTYPES.values()}
    parsed = names.get(dtype) if isinstance(dtype, str) else dtype
    if parsed is None or parsed not in DTYPES.values():
        raise ConfigError(f"dtype {dtype!r} is not possible; choose one of {', '.join(DTYPES)}.")
    return parsed


def stored_dtype(dtype: torch.dtype) -> torch.dtype:
    """What matrices multiplied in ``dtype`` are held in: int8 ones in bfloat16, from which they are rounded."""
    return torch.bfloat16 if dtype == torch.int8 else dtype


def best_device() -> str:
    """Where a model goes if nobody says: "cuda" if there is such a GPU, else "cpu"."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def check_int8(device: torch.device) -> None:
    """ConfigError or UnsupportedError if int8 is impossible; "meta" is where weights are about to be loaded."""
    if device.type not in ("cpu", "meta"):
        raise ConfigError(f"int8 is for CPUs; on {device} take bf16 or fp16.")
    if not selection.supports_int8():
        raise UnsupportedError(
            "int8 needs kernels of this package, of which none runs here, or an x86 CPU with AVX-512 VNNI; "
            f"on this one take {selection.fastest_float()}."
        )


def parse_device(device: str | torch.device) -> torch.device:
    """The device, if it exists and works here."""
    try:
        target = torch.device(device)
        torch.empty(0, device=target)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device {str(device)!r} cannot be used here ({str(error).splitlines()[0]}).") from error
    return target
