"""Self-guided attention on a time series: does a short chirp hidden in noise rise or fall?

    python examples/chirps.py

512 samples of noise, and somewhere in them 64 of a chirp whose pitch rises or falls. A network of one self-guided block
makes 128 tokens of them, looks at 22 instead of all, and learns which are worth it from nothing but the answer.
"""

from __future__ import annotations

import argparse
import math

import torch
from torch import Tensor, nn

from sgformer import SelfGuidedAttention1d

LENGTH, CHIRP = 512, 64


def series(count: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """`count` series (count, LENGTH), whether each chirp falls (count,), and where it is, (count, LENGTH) bool."""
    draw = torch.Generator().manual_seed(seed)
    time = torch.linspace(0, 1, CHIRP)
    rising = torch.sin(2 * math.pi * (3 * time + 7 * time**2))
    falls = torch.randint(2, (count,), generator=draw)
    start = torch.randint(LENGTH - CHIRP, (count,), generator=draw)
    place = torch.arange(LENGTH) - start[:, None]
    inside = (place >= 0) & (place < CHIRP)
    wave = torch.where(falls[:, None].bool(), rising.flip(0)[None], rising[None])
    signal = torch.zeros(count, LENGTH).masked_scatter(inside, 2 * wave * (0.5 - 0.5 * torch.cos(2 * math.pi * time)))
    return signal + 0.5 * torch.randn(count, LENGTH, generator=draw), falls, inside


class ChirpNet(nn.Module):
    """A strided stem, one block of self-guided attention, the mean over time, two classes."""

    def __init__(self, significance: str = "learned", dim: int = 32):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv1d(1, dim, 9, 2, padding=4), nn.GELU(), nn.Conv1d(dim, dim, 9, 2, padding=4))
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attend = SelfGuidedAttention1d(dim, 4, [(0.75, 16), (0.25, 2)], significance)
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))
        self.head = nn.Linear(dim, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x[:, None]).transpose(1, 2)
        x = x + self.attend(self.norm1(x))
        x = x + self.mlp(self.norm2(x))
        return self.head(x.mean(1))


def train(significance: str = "learned", steps: int = 150, seed: int = 0) -> tuple[float, float]:
    """Accuracy on fresh series, and the share of the chirps' samples among salient tokens (chance: 1/8)."""
    torch.manual_seed(seed)
    net = ChirpNet(significance)
    optimizer = torch.optim.AdamW(net.parameters(), 3e-3)
    for step in range(steps):
        x, falls, _ = series(64, seed=1000 + step)
        loss = nn.functional.cross_entropy(net(x), falls)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    x, falls, inside = series(500, seed=1)
    with torch.no_grad():
        accuracy = (net.eval()(x).argmax(1) == falls).float().mean().item()
    assert net.attend.tokens is not None
    salient = net.attend.tokens.region_map() == 1
    return accuracy, inside[:, ::4][salient].float().mean().item()


if __name__ == "__main__":
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--significance", default="learned", help="learned, feature-norm, uniform or random")
    options.add_argument("--steps", type=int, default=150)
    given = options.parse_args()
    accuracy, hits = train(given.significance, given.steps)
    print(f"{100 * accuracy:.1f} % right (chance 50 %)")
    print(f"{100 * hits:.1f} % of salient tokens lie in the chirp (chance {100 * CHIRP / LENGTH:.1f} %)")
