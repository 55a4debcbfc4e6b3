"""Is there a better map than the paper's significance? Candidates of what is known to help, by three measures.

    python benchmarks/maps.py sgformer_n --data TINY --objects CCP COCO --image-size 128 --limit 2000

Every candidate is a map of the tokens of a self-guided block, made without training again of what the network computes:

* **error**: of attention over tokens that are pooled in the map's order, against attention over all of them, relative,
  every block fed with what the network itself computes (docs/theory.md);
* **objects**: what fraction of the most significant region's area lies on objects (OBJECTS: folders with masks, as of
  `sgformer localization`), less the same on the objects of other images;
* **top-1** of the classifier when all blocks rank by the map, at the tokens it was trained with, half and a quarter,
  paired with the paper's map.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from aggregation_error import by_rank
from reliance import classifier, paired, photographs, preparation
from torch import Tensor

import sgformer
from sgformer import ops
from sgformer.data.objects import find_objects
from sgformer.explaining.aggregation_error import aggregation_error
from sgformer.explaining.localization import coverage
from sgformer.models.backbone import GuidedBlock, HybridBlock, HybridScaleAttention, attend_scale, reduce_grid
from sgformer.models.load import find_weights
from sgformer.models.significance import SOURCES
from sgformer.tasks.api import load_explainer

#: What a map is made of: attention received (coarse, fine) (B, H, W); the block's input (B, H, W, C); the input of the
#: hybrid-scale attention before it, and that attention; coarse + fine of all hybrid-scale blocks so far.
Parts = tuple[Tensor, Tensor, Tensor, Tensor, HybridScaleAttention, list[Tensor]]


def source(name: str) -> Callable[[Parts], Tensor]:
    return lambda parts: SOURCES[name](parts[2], parts[0], parts[1])


def smooth(parts: Parts) -> Tensor:
    """The coarse heads' part enlarged bilinearly instead of in blocks."""
    coarse, fine, attn = parts[0], parts[1], parts[4]
    few = coarse[:, :: attn.reduction, :: attn.reduction]
    return enlarged(few, coarse.shape[1:3]) + fine


def enlarged(maps: Tensor, grid: Any) -> Tensor:
    return F.interpolate(maps[:, None], tuple(grid), mode="bilinear", align_corners=False)[:, 0]


def fine_parts(parts: Parts) -> tuple[Tensor, Tensor]:
    """Fine queries, keys and values."""
    x, attn = parts[3], parts[4]
    C = x.shape[-1]
    _, q, kv, _ = attn.proj_in(x).split((C // 2, C // 2, C, C), dim=-1)
    return q, kv


def value_norms(parts: Parts) -> tuple[Tensor, Tensor]:
    """How long a token's value is in the block's output, by coarse and by fine heads, (B, H, W)."""
    x, attn = parts[3], parts[4]
    half = x.shape[-1] // 2
    coarse = attn.kv_coarse(reduce_grid(x, attn.reduction, attn.reduce, attn.reduce_norm))[..., half:]
    weight = attn.proj.weight
    coarse, fine = (
        F.linear(v, w).norm(dim=-1)
        for v, w in ((coarse, weight[:, :half]), (fine_parts(parts)[1][..., half:], weight[:, half:]))
    )
    return ops.enlarge(coarse, attn.reduction, tuple(x.shape[1:3])), fine


def by_values(parts: Parts) -> Tensor:
    """Attention received times the length of the value (Kobayashi et al., EMNLP 2020)."""
    coarse, fine = value_norms(parts)
    return parts[0] * coarse + parts[1] * fine


def fine_by_values(parts: Parts) -> Tensor:
    return parts[1] * value_norms(parts)[1]


def shifted(parts: Parts) -> Tensor:
    """Fine heads in windows and in windows shifted by half, as Swin's: no seams."""
    (q, kv), attn = fine_parts(parts), parts[4]
    by = attn.window // 2
    rolled = attend_scale(q.roll((-by, -by), (1, 2)), kv.roll((-by, -by), (1, 2)), attn.heads, 1, attn.window)[1]
    return parts[0] + (parts[1] + rolled.roll((by, by), (1, 2))) / 2


def everywhere(parts: Parts) -> Tensor:
    """Fine heads over the whole image: no windows."""
    (q, kv), attn = fine_parts(parts), parts[4]
    return parts[0] + attend_scale(q, kv, attn.heads, 1, attn.window, True)[1] * (parts[1].mean() * parts[1][0].numel())


def over_depth(parts: Parts) -> Tensor:
    """The mean over all hybrid-scale blocks so far, each scaled to a mean of 1."""
    grid = parts[0].shape[1:3]
    maps = [F.adaptive_avg_pool2d(m[:, None], tuple(grid))[:, 0] for m in parts[5]]
    return torch.stack([m / m.mean((1, 2), keepdim=True) for m in maps]).mean(0)


def without_sinks(parts: Parts) -> Tensor:
    """Either part cut at twice its mean: single tokens that attract attention do not drown the rest."""
    return sum((m / m.mean((1, 2), keepdim=True)).clamp(max=2) for m in parts[:2])  # type: ignore[return-value]


def balanced(parts: Parts) -> Tensor:
    """Both parts scaled to a mean of 1 before they are added."""
    return sum(m / m.mean((1, 2), keepdim=True) for m in parts[:2])  # type: ignore[return-value]


def neighbours(parts: Parts) -> Tensor:
    """The paper's map, smoothed over 3 x 3 tokens: neighbours go together."""
    whole = parts[0] + parts[1]
    return F.avg_pool2d(whole[:, None], 3, 1, 1, count_include_pad=False)[:, 0]


def contrast(parts: Parts) -> Tensor:
    """How far a token is from its image's mean."""
    x = parts[2]
    return (x - x.mean((1, 2), keepdim=True)).norm(dim=-1)


PAPER = "the paper's: coarse + fine heads"
MAPS: dict[str, Callable[[Parts], Tensor]] = {
    PAPER: source("hybrid"),
    "fine heads alone": source("fine"),
    "coarse heads alone": source("coarse"),
    "both scaled to the same mean": balanced,
    "coarse heads enlarged smoothly": smooth,
    "smoothed over neighbours": neighbours,
    "weighted by the values' length": by_values,
    "fine heads, weighted by the values' length": fine_by_values,
    "fine heads in shifted windows too": shifted,
    "fine heads without windows": everywhere,
    "mean over depth": over_depth,
    "cut at twice the mean (sinks)": without_sinks,
    "distance from the image's mean token": contrast,
    "the features' norm": source("feature-norm"),
    "uniform": source("uniform"),
    "random": source("random"),
    "inverted": source("inverted"),
}


@contextmanager
def watched(model: Any) -> Iterator[Callable[[GuidedBlock, Tensor, Tensor, Tensor], Parts]]:
    """Yields a function from a self-guided block and its input to `Parts`."""
    last: list[Any] = []
    maps: list[Tensor] = []

    def seen(block: HybridBlock, inputs: Any, output: Any) -> None:
        last[:] = [block.norm1(inputs[0]), block.attn]
        maps.append(output[1] + output[2])

    def begin(*_: Any) -> None:
        maps.clear()

    names = {module: name for name, module in model.named_modules() if isinstance(module, HybridBlock)}
    hooks = [block.register_forward_hook(seen) for block in names] + [model.register_forward_pre_hook(begin)]
    try:
        yield lambda block, x, coarse, fine: (coarse, fine, x, last[0], last[1], list(maps))
    finally:
        for hook in hooks:
            hook.remove()


def guided(model: Any) -> list[GuidedBlock]:
    return [module for module in model.modules() if isinstance(module, GuidedBlock)]


def errors(model: Any, images: Tensor) -> dict[str, list[float]]:
    """The mean over blocks, for every image."""
    found: dict[str, list[Tensor]] = {name: [] for name in MAPS}
    with watched(model) as parts_of:

        def hook(block: GuidedBlock, inputs: Any, output: Any) -> None:
            x, attn = block.norm1(inputs[0]), block.attn
            B, C = len(x), x.shape[-1]
            q = attn.proj_in(x)[..., :C].flatten(1, 2)
            k, v = attn.kv(x.flatten(1, 2)).chunk(2, -1)
            parts = parts_of(block, *inputs)
            for name, make in MAPS.items():
                order = make(parts).flatten(1).argsort(dim=1, stable=True)
                rows = []
                for i in range(B):
                    queries, keys, values = (ops.split_heads(t[i : i + 1], attn.heads)[0] for t in (q, k, v))
                    rows.append(
                        aggregation_error(queries, keys, values, by_rank(order[i], attn.aggregate)).relative.mean()
                    )
                found[name].append(torch.stack(rows))

        hooks = [block.register_forward_hook(hook) for block in guided(model)]
        model(images)
        for one in hooks:
            one.remove()
    return {name: torch.stack(rows).mean(0).tolist() for name, rows in found.items()}


def on_objects(weights: str, data: str, size: int) -> dict[str, float]:
    """Points of the salient area on the image's own objects above those of other images, the mean over blocks."""
    explainer = load_explainer(weights, "cpu", None, image_size=size)
    model, objects = explainer.network.eval(), find_objects(data)
    blocks = guided(model)
    chosen: dict[tuple[str, int], list[np.ndarray]] = {}
    covered: dict[int, list[np.ndarray]] = {}
    with watched(model) as parts_of:
        now: list[np.ndarray] = []

        def hook(block: GuidedBlock, inputs: Any, output: Any) -> None:
            number, grid = blocks.index(block), tuple(inputs[0].shape[1:3])
            part = coverage(now[0], grid, now[0].shape[0] // grid[0])
            covered.setdefault(number, []).append(part.ravel())
            salient = ops.region_lengths(part.size, block.attn.aggregate.shares)[-1]
            for name, make in MAPS.items():
                order = make(parts_of(block, *inputs))[0].flatten().argsort(stable=True)
                where = np.zeros(part.size)
                where[order[-salient:].numpy()] = 1 / salient
                chosen.setdefault((name, number), []).append(where)

        hooks = [block.register_forward_hook(hook) for block in blocks]
        for i in range(len(objects)):
            image, mask = objects[i]
            now[:] = [explainer.mask(explainer.read_mask(mask))]
            if now[0].any():
                model(explainer.read(image)[None])
        for one in hooks:
            one.remove()
    gains: dict[str, list[float]] = {}
    for (name, number), maps in chosen.items():
        crossed = np.stack(maps) @ np.stack(covered[number]).T
        n, own = len(crossed), np.trace(crossed)
        gains.setdefault(name, []).append(100 * (own / n - (crossed.sum() - own) / (n * (n - 1))))
    return {name: float(np.mean(values)) for name, values in gains.items()}


@contextmanager
def ranked(model: Any, make: Callable[[Parts], Tensor]) -> Iterator[None]:
    """All self-guided blocks rank by a map."""
    own = [block.source for block in guided(model)]
    with watched(model) as parts_of:
        for block in guided(model):
            block.source = lambda x, coarse, fine, block=block: make(parts_of(block, x, coarse, fine))
        yield
    for block, before in zip(guided(model), own, strict=True):
        block.source = before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("weights", help="of a classifier: a run folder, .safetensors or sgformer_n")
    parser.add_argument("--data", required=True, help="the validation data, as of its training")
    parser.add_argument("--objects", nargs="*", default=[], help="folders of images with masks")
    parser.add_argument("--image-size", type=int, default=128)
    parser.add_argument("--images", type=int, default=32, help="for the error")
    parser.add_argument("--limit", type=int, default=2000, help="for top-1")
    given = parser.parse_args()
    weights = str(find_weights(given.weights))
    columns: dict[str, dict[str, str]] = {name: {} for name in MAPS}
    with torch.no_grad():
        model: Any = sgformer.load_model(weights)
        listing, order, _ = photographs(model, given.data, "val", given.images)
        prepare = preparation(model, given.image_size)
        images = torch.stack([prepare(image) for image in listing.read_many(order)])
        for name, rows in errors(model, images).items():
            values = torch.tensor(rows)
            columns[name]["error"] = f"{values.mean():.3f} ± {values.std() / len(values) ** 0.5:.3f}"
        for data in given.objects:
            for name, gain in on_objects(weights, data, given.image_size).items():
                columns[name][f"objects of {data}"] = f"{gain:+.1f}"
        if given.limit:
            model, score = classifier(weights, given.data, "val", 25, given.image_size, given.limit)
            for budget in (1.0, 0.5, 0.25):
                sgformer.set_token_budget(model, budget)
                own = None
                for name, make in MAPS.items():
                    with ranked(model, make):
                        value, right = score()
                    own = right if own is None else own
                    told = "" if name == PAPER else f" ({paired(right, own).strip(' |')})"
                    columns[name][f"top-1, tokens x {budget:g}"] = f"{value:.1f}{told}"
    titles = list(columns[PAPER])
    print(f"| map | {' | '.join(titles)} |\n" + "|---" * (1 + len(titles)) + "|")
    for name, cells in columns.items():
        print(f"| {name} | {' | '.join(cells[title] for title in titles)} |")


if __name__ == "__main__":
    main()
