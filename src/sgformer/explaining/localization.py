"""Localization: do salient tokens fall on objects more often than expected by chance?

Three measures per self-guided block, over images with annotated objects:

* energy inside: the fraction of the salient tokens' area that lies on objects (salient: the most significant region);
* area: the objects' fraction of the image, the expected value for tokens placed at random;
* shuffled: energy inside with each image's salient tokens evaluated on the objects of all other images. Maps and
  objects share a centre bias; this baseline keeps it, so any difference is specific to the image.

Energy inside gets a permutation test: the objects are reassigned to images at random, and p is the fraction of
assignments (the true one included) that reach the measured value.
"""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass

import numpy as np

from sgformer.core.errors import UserError
from sgformer.core.files import make_folder, replacing, write_json
from sgformer.core.names import GROUND, without_login
from sgformer.core.progress import track
from sgformer.data.objects import KnownObjects
from sgformer.explaining.base import Explainer
from sgformer.results import Explanation

PERMUTATIONS = 10_000
#: The block name of the mean over all blocks.
ALL = "all"


@dataclass(frozen=True)
class Localization:
    """Localization of one self-guided block's salient tokens.

    Attributes:
        block: "stage.block", or "all" for the mean over blocks.
        images: number of images with objects.
        energy_inside, area, shuffled: fractions in [0, 1]; see the module.
        p: one-sided p-value of the permutation test.
        more: number of images with `energy_inside` above `area`.
        sign_p: one-sided p-value of the sign test of that; ties are dropped.
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
    """The objects' fraction of every token's `stride` x `stride` pixels: (H, W) bool -> (h, w) float64."""
    (H, W), (h, w) = mask.shape, grid
    padded = np.zeros((h * stride, w * stride))
    valid = np.zeros_like(padded)
    padded[:H, :W], valid[:H, :W] = mask[: h * stride, : w * stride], 1
    sums = [a.reshape(h, stride, w, stride).sum((1, 3)) for a in (padded, valid)]
    return sums[0] / np.maximum(sums[1], 1)


def salient(explanation: Explanation, block: str) -> np.ndarray:
    """The tokens of a self-guided block's most significant region, (h, w) bool."""
    return explanation.regions[block] == len(explanation.rates[block]) - 1


def stride_of(block: str) -> int:
    """The stride of a block's stage in pixels: 4, 8 or 16."""
    return 2 ** (int(block.split(".")[0]) + 1)


def salient_energy(explanation: Explanation, mask: np.ndarray) -> dict[str, tuple[float, float]]:
    """Energy inside and the objects' area of one image, by block."""
    energies = {}
    for block in explanation.tokens:
        chosen = salient(explanation, block)
        covered = coverage(mask, chosen.shape, stride_of(block))
        energies[block] = float(covered[chosen].mean()), float(covered.mean())
    return energies


def measure(
    pairs: Iterable[tuple[Explanation, np.ndarray]], permutations: int = PERMUTATIONS, seed: int = 0
) -> list[Localization]:
    """Compute the three measures and their tests.

    Args:
        pairs: explanations, each with the objects' pixels in `Explanation.image`, (H, W) bool. Images without objects
            are left out; all others must have the same size.
        permutations: number of random assignments in the permutation test.
        seed: for the permutations.

    Returns:
        One entry per self-guided block, and one for "all".

    Raises:
        UserError: fewer than two images with objects, objects that fill all images, images of different sizes, or a
            network that reallocates no tokens.
    """
    chosen: dict[str, list[np.ndarray]] = {}
    covered: dict[str, list[np.ndarray]] = {}
    for explanation, mask in pairs:
        if not explanation.tokens:
            raise UserError("the network reallocates no tokens (pairs is not guided), so there is nothing to measure")
        if not mask.any():
            continue
        for block in explanation.tokens:
            selected = salient(explanation, block)
            chosen.setdefault(block, []).append(selected.ravel() / selected.sum())
            covered.setdefault(block, []).append(coverage(mask, selected.shape, stride_of(block)).ravel())
            if chosen[block][-1].shape != chosen[block][0].shape:
                raise UserError("the images have different sizes; pass --image-size to resize them all")
    if len(next(iter(chosen.values()), [])) < 2:
        raise UserError("at least two images with objects are needed")
    if all(part.min() == 1 for part in next(iter(covered.values()))):
        raise UserError(
            "every pixel of all images belongs to an object, so there is nothing to find; a class is taken for the "
            f"background if it is named {', '.join(sorted(GROUND))}"
        )
    crossed = {block: np.stack(chosen[block]) @ np.stack(covered[block]).T for block in chosen}  # maps x objects
    areas = {block: np.stack(covered[block]).mean(1) for block in chosen}
    crossed[ALL], areas[ALL] = np.mean(list(crossed.values()), 0), np.mean(list(areas.values()), 0)
    return [_test(block, crossed[block], areas[block], permutations, seed) for block in crossed]


# The tests are NumPy and math: scipy.stats gives the same p-values, but is 113 MB that the train extra does not need.
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
    """The probability of `more` or more heads in `more + less` tosses of a fair coin."""
    n = more + less
    return sum(math.comb(n, k) for k in range(more, n + 1)) / 2**n


def explain_objects(
    explainer: Explainer, objects: KnownObjects, limit: int | None = None
) -> Iterable[tuple[Explanation, np.ndarray]]:
    """Explain images and map their objects to the network's input; `limit` takes that many, evenly spaced."""
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
    """Measure whether a trained network spends its tokens on the objects of a data set; see the module.

    Args:
        explainer: the network's explainer.
        objects: images with known objects, from `sgformer.data.objects.find_objects`.
        limit: maximum number of images, evenly spaced.
        permutations: number of random assignments in the permutation test.

    Raises:
        UserError: the network or the data is invalid, or they do not match.
    """
    count = min(limit or len(objects), len(objects))
    return measure(track(explain_objects(explainer, objects, limit), count, "explaining"), permutations)


def write_localization(blocks: list[Localization], folder: str | os.PathLike[str], about: Mapping[str, object]) -> None:
    """Write `localization.csv`, `localization.json` (with the entries of `about`) and `localization.png`."""
    from sgformer.viz.evolution import draw_localization

    out = make_folder(folder)
    rows = [asdict(block) for block in blocks]
    with replacing(out / "localization.csv") as part, part.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)
    shown = {name: without_login(value) if isinstance(value, str) else value for name, value in about.items()}
    write_json(out / "localization.json", {**shown, "blocks": rows})
    draw_localization(rows, out / "localization.png")


def table(blocks: list[Localization]) -> str:
    """A text table with one line per block."""
    lines = [f"{'block':<6} {'inside':>8} {'area':>8} {'shuffled':>8} {'p':>8}   images above area (sign test)"]
    for one in blocks:
        shares = " ".join(f"{100 * v:7.1f}%" for v in (one.energy_inside, one.area, one.shuffled))
        lines.append(f"{one.block:<6} {shares} {one.p:8.4f}   {one.more} of {one.images} (p = {one.sign_p:.2g})")
    return "\n".join(lines)
