"""Resolve `--device` to a torch device."""

from __future__ import annotations

import torch

from sgformer.core.errors import UserError


def find_device(name: str = "auto") -> torch.device:
    """Resolve a device name: auto (a GPU if available, else the CPU), cpu, cuda, cuda:N or mps.

    Raises:
        UserError: the name is unknown, or the device is not available on this machine.
    """
    kind, _, index = name.partition(":")
    if kind not in ("auto", "cpu", "cuda", "mps") or (index and not (kind == "cuda" and index.isdigit())):
        raise UserError(f"--device must be auto, cpu, cuda, cuda:N or mps, got {name}")
    if kind == "auto":
        kind = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if kind == "cuda" and not torch.cuda.is_available():
        raise UserError(f"--device {name}: torch finds no CUDA device; --device cpu works everywhere")
    if index and int(index) >= torch.cuda.device_count():
        raise UserError(f"--device {name}: this machine has {torch.cuda.device_count()} CUDA devices, numbered from 0")
    if kind == "mps" and not torch.backends.mps.is_available():
        raise UserError(f"--device {name}: torch finds no Apple GPU; --device cpu works everywhere")
    return torch.device(name if index else kind)
