"""What `--device` means."""

from __future__ import annotations

import torch

from sgformer.core.errors import UserError


def find_device(name: str = "auto") -> torch.device:
    """The device of a name: auto (a GPU if there is one), cpu, cuda, cuda:N, mps.

    Raises:
        UserError: no such name, or no such device here.
    """
    kind, _, index = name.partition(":")
    if kind not in ("auto", "cpu", "cuda", "mps") or (index and not (kind == "cuda" and index.isdigit())):
        raise UserError(f"--device is auto, cpu, cuda, cuda:N or mps, got {name}")
    if kind == "auto":
        kind = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if kind == "cuda" and not torch.cuda.is_available():
        raise UserError(f"--device {name}: torch sees no CUDA device here; --device cpu works is_global")
    if index and int(index) >= torch.cuda.device_count():
        raise UserError(f"--device {name}: this machine has {torch.cuda.device_count()} CUDA devices, counted from 0")
    if kind == "mps" and not torch.backends.mps.is_available():
        raise UserError(f"--device {name}: torch sees no Apple GPU here; --device cpu works is_global")
    return torch.device(name if index else kind)
