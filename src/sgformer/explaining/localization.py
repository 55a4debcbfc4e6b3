"""Localization: do salient tokens fall on the objects more often than chance?

Three numbers for every self-guided block, over images whose objects are known:

* energy inside: the share of salient tokens' area that lies on objects (salient: the most significant region);
* area: the objects' share of the image, which is what tokens placed at random would reach;
* shuffled: energy inside again, but with each image's salient tokens laid on the objects of all other images. Maps and
  objects both prefer the middle of an image; this baseline keeps that, so what differs is about the image itself.

The test is a permutation test of energy inside: the objects are reassigned to images at random many times, and p is the
share of assignments (the true one included) that reach the measured value.
"""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from sgformer.core.errors import UserError
from sgformer.core.files import write_json
from sgformer.core.progress import track
from sgformer.data.objects import KnownObjects
from sgformer.explaining.base import Explainer
from sgformer.results import Explanation

PERMUTATIONS = 10_000
#: The name of the mean over all blocks, as a block.
ALL = "all"


@dataclass(frozen=True)
class Localization:
    """Where the salient tokens of one self-guided block landed.

    Attributes:
        block: "stage.block", or "all" for the mean over blocks.
        images: how many with objects.
        energy_inside, area, shuffled: fractions; see the module.
        p: of the permutation test, one-sided.
        more: in how many images `energy_inside` is above `area`.
        sign_p: of the one-sided sign test of that, images without a difference left out.
    """

    block: str
    images: int
    energy_inside: float
    area: float
    shuffled: float
    p: float
    more: int
    sign_p: float


def coverage(mask: np.ndarray, grid: tuple[int, int], stride: int) -> np.ndarray:
    """The objects' share of every token's pixels, `stride` x `stride`: (H, W) bool -> (h, w) float."""
    (H, W), (h, w) = mask.shape, grid
    padded = np.zeros((h * stride, w * stride))
    real = np.zeros_like(padded)
    padded[:H, :W], real[:H, :W] = mask[: h * stride, : w * stride], 1
    sums = [a.reshape(h, stride, w, stride).sum((1, 3)) for a in (padded, real)]
    return sums[0] / np.maximum(sums[1], 1)


def salient(seen: Explanation, block: str) -> np.ndarray:
    """(h, w) bool: tokens of the most significant region of a self-guided block."""
    return seen.regions[block] == len(seen.rates[block]) - 1


def stride_of(block: str) -> int:
    """Pixels between tokens of a block's stage: 4, 8, 16."""
    return 2 ** (int(block.split(".")[0]) + 1)


def salient_energy(seen: Explanation, mask: np.ndarray) -> dict[str, tuple[float, float]]:
    """By block of one image: the share of salient tokens' area inside objects, and the objects' share of all tokens."""
    found = {}
    for block in seen.tokens:
        chosen = salient(seen, block)
        covered = coverage(mask, chosen.shape, stride_of(block))
        found[block] = float(covered[chosen].mean()), float(covered.mean())
    return found


def measure(
    pairs: Iterable[tuple[Explanation, np.ndarray]], permutations: int = PERMUTATIONS, seed: int = 0
) -> list[Localization]:
    """The three numbers and their tests.

    Args:
        pairs: what a network saw of an image, and the objects' pixels on the image it was shown, (H, W) bool. Images
            without objects are left out; all have to be of one size.
        permutations: of the permutation test.
        seed: of the permutations.

    Returns:
        One for every self-guided block, and "all".

    Raises:
        UserError: fewer than two images with objects, images of different sizes, or a network without reallocation.
    """
    chosen: dict[str, list[np.ndarray]] = {}
    covered: dict[str, list[np.ndarray]] = {}
    for seen, mask in pairs:
        if not seen.tokens:
            raise UserError("the network reallocates no tokens (pairs is not guided): there is nothing to measure")
        if not mask.any():
            continue
        for block in seen.tokens:
            where = salient(seen, block)
            chosen.setdefault(block, []).append(where.ravel() / where.sum())
            covered.setdefault(block, []).append(coverage(mask, where.shape, stride_of(block)).ravel())
            if chosen[block][-1].shape != chosen[block][0].shape:
                raise UserError("the images have different sizes; pass --image-size so that all become one size")
    if len(next(iter(chosen.values()), [])) < 2:
        raise UserError("at least two images with objects are needed")
    crossed = {block: np.stack(chosen[block]) @ np.stack(covered[block]).T for block in chosen}  # maps x objects
    areas = {block: np.stack(covered[block]).mean(1) for block in chosen}
    crossed[ALL], areas[ALL] = np.mean(list(crossed.values()), 0), np.mean(list(areas.values()), 0)
    return [_test(block, crossed[block], areas[block], permutations, seed) for block in crossed]


def _test(block: str, crossed: np.ndarray, area: np.ndarray, permutations: int, seed: int) -> Localization:
    n = len(crossed)
    own = np.diag(crossed)
    rng, rows = np.random.default_rng(seed), np.arange(n)
    permuted = np.array([crossed[rows, rng.permutation(n)].mean() for _ in range(permutations)])
    p = (1 + np.count_nonzero(permuted >= own.mean() - 1e-12)) / (1 + permutations)
    more, less = int((own > area + 1e-12).sum()), int((own < area - 1e-12).sum())
    shuffled = (crossed.sum() - own.sum()) / (n * (n - 1))
    return Localization(
        block, n, float(own.mean()), float(area.mean()), float(shuffled), float(p), more, sign_test(more, less)
    )


def sign_test(more: int, less: int) -> float:
    """The chance of `more` or more heads in `more + less` throws of a fair coin."""
    n = more + less
    return sum(math.comb(n, k) for k in range(more, n + 1)) / 2**n


def explain_objects(
    explainer: Explainer, objects: KnownObjects, limit: int | None = None
) -> Iterable[tuple[Explanation, np.ndarray]]:
    """Images explained, and their objects' pixels on the image the network got; `limit` spreads evenly."""
    count = len(objects) if limit is None else min(limit, len(objects))
    for i in range(count):
        image, mask = objects[i * len(objects) // count]
        yield explainer.explain(explainer.read(image)), explainer.mask(explainer.read_mask(mask))


def localize(
    explainer: Explainer,
    objects: KnownObjects,
    limit: int | None = None,
    permutations: int = PERMUTATIONS,
) -> list[Localization]:
    """Whether a trained network spends its tokens on the objects of a data set; see the module.

    Args:
        explainer: of the network.
        objects: the images and where their objects are, from `sgformer.data.objects.find_objects`.
        limit: so many images at most, spread evenly.
        permutations: of the test.

    Raises:
        UserError: network or data are invalid, or do not go together.
    """
    count = min(limit or len(objects), len(objects))
    return measure(track(explain_objects(explainer, objects, limit), count, "explaining"), permutations)


def write_localization(found: list[Localization], folder: str | os.PathLike[str], about: Mapping[str, object]) -> None:
    """`localization.csv`, `localization.json` (with `about`) and `localization.png`."""
    from sgformer.viz.evolution import draw_localization

    out = Path(folder)
    out.mkdir(parents=True, exist_ok=True)
    rows = [asdict(one) for one in found]
    with (out / "localization.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)
    write_json(out / "localization.json", {**about, "blocks": rows})
    draw_localization(rows, out / "localization.png")


def table(found: list[Localization]) -> str:
    """Plain text, a block a line."""
    lines = [f"{'block':<6} {'inside':>8} {'area':>8} {'shuffled':>8} {'p':>8}   images above area (sign test)"]
    for one in found:
        shares = " ".join(f"{100 * v:7.1f}%" for v in (one.energy_inside, one.area, one.shuffled))
        lines.append(f"{one.block:<6} {shares} {one.p:8.4f}   {one.more} of {one.images} (p = {one.sign_p:.2g})")
    return "\n".join(lines)
