"""Weights and images drawn from their names, and the numbers the published code computes from them in float64."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

GOLDEN = Path(__file__).parent / "golden"


def draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
    return np.random.Generator(np.random.PCG64(seed)).standard_normal(shape)


def released_state(size: str) -> dict[str, Tensor]:
    """A state dict in the released layout of "s", "m" or "b", float64, every value drawn from its name."""
    state = {}
    for name, shape in json.loads((GOLDEN / f"sgformer_{size}_parameters.json").read_text()).items():
        z = draw(name, tuple(shape))
        if name == "pos_embed" or name.endswith(".bias"):
            z = 0.1 * z
        elif z.ndim == 1:
            z = 1 + 0.1 * z
        else:
            z = z / math.sqrt(math.prod(shape[1:]))
        state[name] = torch.from_numpy(z)
    return state


def image(stem: str, size: tuple[int, int]) -> Tensor:
    return torch.from_numpy(draw(f"image:{stem}", (2, 3, *size)))


def numbers(stem: str) -> dict[str, np.ndarray]:
    with np.load(GOLDEN / f"{stem}.npz") as f:
        return dict(f)
