"""How much attention over pooled tokens loses, by the way the groups are made: the tables of docs/theory.md.

    python benchmarks/aggregation_error.py sgformer_n --data TINY --image-size 64 128 --images 32
    python benchmarks/aggregation_error.py sgformer_n --data TINY --image-size 128 --accuracy 2000

Errors are of every self-guided block of a trained classifier on real photographs, each block fed with what the network
itself computes, against attention over all tokens: the norm of the difference over the norm, the mean over queries,
heads, blocks and images. All ways make the same number of groups. --accuracy puts the ways that a network can use into
all blocks instead, without training again.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from reliance import classifier, paired
from torch import Tensor

import sgformer
from sgformer import ops
from sgformer.data.preparing import eval_transform, preprocessing
from sgformer.explaining.aggregation_error import aggregation_error
from sgformer.models.backbone import GuidedBlock
from sgformer.models.config import Region
from sgformer.models.load import find_weights
from sgformer.models.significance import MeanAggregation, MergeAggregation
from sgformer.tasks.classify.predict import open_named

#: significance (N,), keys and values (N, 2 C), tokens (N, C), grid, aggregation, number of groups -> groups (N,)
Way = Callable[..., Tensor]


def by_rank(order: Tensor, pool: Any) -> Tensor:
    """The group of each token when sorted tokens are cut at the network's shares and rates."""
    lengths = ops.region_lengths(len(order), pool.shares)
    ends, start, labels = [], 0, torch.empty_like(order)
    for length, rate in zip(lengths, pool.rates, strict=True):
        groups = -(-length // rate)
        ends.append(start + torch.arange(length) * groups // length)  # of equal size to one token
        start += groups
    labels[order] = torch.cat(ends)
    return labels


def as_cells(grid: tuple[int, int], groups: int) -> Tensor:
    """Cells of the grid as square as possible, at most `groups`."""
    height, width = grid
    rows = max(1, min(height, round((groups * height / width) ** 0.5)))
    columns = max(1, min(width, groups // rows))
    down, across = torch.arange(height) * rows // height, torch.arange(width) * columns // width
    return (down[:, None] * columns + across).flatten()


def by_k_means(features: Tensor, groups: int, weights: Tensor | None = None, rounds: int = 15) -> Tensor:
    """Lloyd's algorithm from evenly drawn tokens; empty groups disappear."""
    weights = torch.ones(len(features)) if weights is None else weights
    centres = features[torch.randperm(len(features), generator=torch.Generator().manual_seed(0))[:groups]]
    for _ in range(rounds):
        label = torch.cdist(features, centres).argmin(1)
        total = torch.zeros(len(centres)).index_add(0, label, weights)
        sums = torch.zeros_like(centres).index_add(0, label, features * weights[:, None])
        centres = torch.where(total[:, None] > 0, sums / total.clamp(min=1e-12)[:, None], centres)
    return label.unique(return_inverse=True)[1]


def ways() -> dict[str, Way]:
    def ranked(name: str) -> Way:
        def way(significance: Tensor, kv: Tensor, x: Tensor, grid: Any, pool: Any, groups: int) -> Tensor:
            generator = torch.Generator().manual_seed(0)
            order = {
                "the network's ranking": significance.argsort(stable=True),
                "the ranking inverted": significance.argsort(stable=True, descending=True),
                "uniform: raster order": torch.arange(len(significance)),
                "random": torch.randperm(len(significance), generator=generator),
            }[name]
            return by_rank(order, pool)

        return way

    def similar(significance: Tensor, kv: Tensor, x: Tensor, grid: Any, pool: Any, groups: int) -> Tensor:
        order = significance.argsort(stable=True)[None]
        return ops.merge_similar(x[None], order, pool.ends, pool.rates)[1][0].unique(return_inverse=True)[1]

    names = ("the network's ranking", "the ranking inverted", "uniform: raster order", "random")
    return {name: ranked(name) for name in names} | {
        "cells of the grid": lambda s, kv, x, grid, pool, groups: as_cells(grid, groups),
        "ranked regions, similar tokens within": similar,
        "k-means of keys and values": lambda s, kv, x, grid, pool, groups: by_k_means(kv, groups),
        "k-means, weighted by significance": lambda s, kv, x, grid, pool, groups: by_k_means(kv, groups, s),
    }


def errors(model: Any, images: Tensor) -> dict[str, list[tuple[float, float, float]]]:
    """Relative error, relative bound and the share of the error within groups, by way, per block and image."""
    found: dict[str, list[tuple[float, float, float]]] = {name: [] for name in ways()}

    def hook(block: GuidedBlock, inputs: Any, output: Any) -> None:
        x, significance = block.norm1(inputs[0]), output[1]
        attn, (B, H, W, C) = block.attn, inputs[0].shape
        q = attn.proj_in(x)[..., :C].flatten(1, 2)
        tokens = x.flatten(1, 2)
        kv = attn.kv(tokens)
        groups = sum(
            -(-length // rate)
            for length, rate in zip(ops.region_lengths(H * W, attn.aggregate.shares), attn.aggregate.rates, strict=True)
        )
        for i in range(B):
            scaled = kv[i] / kv[i].std(0, keepdim=True).clamp(min=1e-6)
            queries, keys, values = (
                ops.split_heads(t[None], attn.heads)[0] for t in (q[i], kv[i, :, :C], kv[i, :, C:])
            )
            for name, way in ways().items():
                token = way(significance[i].flatten(), scaled, tokens[i], (H, W), attn.aggregate, groups)
                result = aggregation_error(queries, keys, values, token)
                size = result.full.norm(dim=-1)
                parts = [result.within.norm(dim=-1), result.between.norm(dim=-1)]
                found[name].append(
                    (
                        result.relative.mean().item(),
                        (result.bound / size).mean().item(),
                        (parts[0] / (parts[0] + parts[1]).clamp(min=1e-12)).mean().item(),
                    )
                )

    hooks = [m.register_forward_hook(hook) for m in model.modules() if isinstance(m, GuidedBlock)]
    model(images)
    for one in hooks:
        one.remove()
    return found


def error_table(weights: str, data: str, size: int, count: int) -> None:
    model: Any = sgformer.load_model(weights)
    listing = open_named(data, "val", model.metadata)
    transform = eval_transform(**(preprocessing(model.metadata) | {"image_size": (size, size)}))
    chosen = torch.randperm(len(listing), generator=torch.Generator().manual_seed(0))[:count]
    from sgformer.data.imagefolder import ImageFolderDataset

    dataset = ImageFolderDataset(listing, transform)
    found: dict[str, list[Any]] = {}
    for i in chosen.tolist():
        for name, rows in errors(model, dataset[i].image[None]).items():
            found.setdefault(name, []).append(torch.tensor(rows).mean(0))  # over blocks
    print(f"\n{size} pixels, {count} photographs\n")
    print("| groups | error | bound | within groups |\n|---|---|---|---|")
    for name, rows in found.items():
        values = torch.stack(rows)
        mean, spread = values.mean(0), values[:, 0].std() / len(values) ** 0.5
        print(f"| {name} | {mean[0]:.3f} ± {spread:.3f} | {mean[1]:.2f} | {100 * mean[2]:.0f} % |", flush=True)


def accuracy_table(weights: str, data: str, size: int, count: int) -> None:
    model, score = classifier(weights, data, "val", 25, size, count)
    blocks = [m for m in model.modules() if isinstance(m, GuidedBlock)]
    learned = [block.attn.aggregate for block in blocks]
    print(f"\n{size} pixels, {count} photographs\n")
    print("| tokens x | pooled by | top-1, % | against the learned map |\n|---|---|---|---|")
    for budget in (1.0, 0.5, 0.25):
        own = None
        for name, kind in (("the learned map", None), ("mean", MeanAggregation), ("similarity", MergeAggregation)):
            for block, pool in zip(blocks, learned, strict=True):
                regions = [Region(*r) for r in zip(pool.shares, pool._rates, strict=True)]
                block.attn.aggregate = kind(regions) if kind else pool
            sgformer.set_token_budget(model, budget)
            value, right = score()
            own = right if own is None else own
            print(f"| {budget:g} | {name} | {value:.1f} |{paired(right, own)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("weights", help="a run folder, .safetensors or sgformer_n; a classifier")
    parser.add_argument("--data", required=True, help="the validation data, as of its training")
    parser.add_argument("--image-size", type=int, nargs="+", default=[64])
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--accuracy", type=int, help="measure top-1 on so many images instead")
    given = parser.parse_args()
    torch.set_num_threads(1)
    with torch.no_grad():
        for size in given.image_size:
            if given.accuracy:
                accuracy_table(str(find_weights(given.weights)), given.data, size, given.accuracy)
            else:
                error_table(str(find_weights(given.weights)), given.data, size, given.images)


if __name__ == "__main__":
    main()
