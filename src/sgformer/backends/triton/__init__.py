"""Kernels for GPUs, in Triton: attention with the attention received, and aggregation, forward and backward.

They stand in for operations of :mod:`sgformer.ops`. Nothing uses them unless it is asked to, with
``sgformer.optimize(model, triton=True)`` or ``sgformer.accelerate(model, triton=True)``: they have not been measured.
"""

from __future__ import annotations

import importlib.util
import os

import torch

from sgformer.core.errors import UserError

OLDEST = (8, 0)  # what Triton supports of NVIDIA's


def interpreted() -> bool:
    """Whether Triton interprets kernels, on CPU tensors: slow, for tests. Triton reads it when it is imported."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def check(device: torch.device | None = None) -> None:
    """Raise UserError unless the kernels run on a device; None: on some device of this machine."""
    if importlib.util.find_spec("triton") is None:
        raise UserError("triton=True needs the package triton, which comes with torch's builds for Linux; leave it out")
    if interpreted():
        return
    if not torch.cuda.is_available():
        raise UserError("triton=True needs a CUDA device, and torch finds none here; leave it out")
    if device is not None and device.type != "cuda":
        raise UserError(f"triton=True is for networks on a CUDA device (got one on {device}); call model.cuda() first")
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < OLDEST:
        name = torch.cuda.get_device_name(device)
        raise UserError(
            f"triton=True needs a GPU of compute capability {OLDEST[0]}.{OLDEST[1]} (got {name}); leave it out"
        )
