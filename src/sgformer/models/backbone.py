"""SG-Former, the self-guided vision transformer (Ren, Yang, Liu, Wang, ICCV 2023, arXiv 2308.12216).

Stages 1 to 3 are pairs of blocks. The first block attends at two scales and, as a by-product, yields the attention
every token receives: its significance (:class:`HybridScaleAttention`, paper section 3.2). In the second, all tokens
attend to a few pooled tokens, most of them spent where significance is high (:class:`SelfGuidedAttention`, section
3.3). Stage 4 is global self-attention. docs/method.md maps every formula to its function and lists the differences
between code and paper.

Legend: B batch, H x W token grid of a stage, N = H * W, C channels, h heads, d = C / h. Within a stage every tensor is
(B, H, W, C), which convolutions read as a channels-last image without a copy; before and after it, (B, C, H, W).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor, fx
from torch.utils.checkpoint import checkpoint

from sgformer import ops
from sgformer.models.config import Region, SGFormerConfig, StageConfig
from sgformer.models.layers import (
    ClassifierHead,
    DepthwiseConv,
    Downsample,
    DropPath,
    Mlp,
    Stem,
    convolve,
    created_on,
    init_module,
)
from sgformer.models.significance import AGGREGATIONS, gate, make_source, set_token_budget, token_budget
from sgformer.ops import MergedTokens, TokenGroups
from sgformer.ops.sizes import ceil_to, known, outside_graph


@dataclass
class Inspection:
    """The intermediate results of one forward pass, by "stage.block"; stages count from 1, blocks from 0.

    Attributes:
        logits: (B, num_classes), or the pooled features (B, C) of a model without a classifier.
        features: the four stages' outputs, (B, C_s, H_s, W_s), strides 4, 8, 16, 32.
        significance: per hybrid-scale block, (B, H, W) float32, detached: the values by which the next self-guided
            block sorts, ``coarse + fine`` unless the config names another source.
        coarse, fine: per hybrid-scale block, (B, H, W): the attention received from its coarse and fine heads.
        tokens: per self-guided block, the tokens that form each key/value token, and their weights.
    """

    logits: Tensor | None = None
    features: list[Tensor] = field(default_factory=list)
    significance: dict[str, Tensor] = field(default_factory=dict)
    coarse: dict[str, Tensor] = field(default_factory=dict)
    fine: dict[str, Tensor] = field(default_factory=dict)
    tokens: dict[str, TokenGroups | MergedTokens] = field(default_factory=dict)


class HybridScaleAttention(nn.Module):
    """Half of the heads attend coarsely over a wide reach, half finely within windows (section 3.2).

    Coarse heads take keys and values from a grid reduced r times, fine heads from ``window`` x ``window`` windows. The
    attention that tokens receive from both is their significance.
    """

    def __init__(self, dim: int, heads: int, reduction: int, window: int, coarse: str):
        super().__init__()
        self.heads, self.reduction, self.window, self.coarse = heads // 2, reduction, window, coarse
        self.reduce = nn.Conv2d(dim, dim, reduction, reduction)
        self.reduce_norm = nn.LayerNorm(dim, eps=1e-5)
        self.kv_coarse = nn.Linear(dim, dim)
        self.proj_in = nn.Linear(dim, 3 * dim)  # coarse queries; fine queries, keys, values; local term
        self.local = DepthwiseConv(dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, H, W, C) -> the output, of the same shape, and the coarse and fine terms of significance, (B, H, W)."""
        C = x.shape[-1]
        q_coarse, q_fine, kv_fine, local = self.proj_in(x).split((C // 2, C // 2, C, C), dim=-1)
        reduced = reduce_grid(x, self.reduction, self.reduce, self.reduce_norm)  # (B, ceil(H / r), ceil(W / r), C)
        coarse_out, coarse_significance = outside_graph(
            attend_scale,
            q_coarse,
            self.kv_coarse(reduced),
            self.heads,
            self.reduction,
            self.window,
            self.coarse == "global",
        )
        fine_out, fine_significance = outside_graph(attend_scale, q_fine, kv_fine, self.heads, 1, self.window)
        out = torch.cat([coarse_out, fine_out], dim=-1) + convolve(
            self.local, local.contiguous()
        )  # a copy, so that proj_in's output can be freed
        return self.proj(out), coarse_significance, fine_significance


class MultiScaleAttention(nn.Module):
    """The paper's general form (section 3.2): head group j takes keys and values from a grid reduced s_j times.

    With scales (r, 1) it equals :class:`HybridScaleAttention`, with parameters laid out by group.
    """

    def __init__(self, dim: int, heads: int, scales: Sequence[int], window: int, coarse: str):
        super().__init__()
        self.scales, self.heads, self.window, self.coarse = tuple(scales), heads // len(scales), window, coarse
        self.reduce = nn.ModuleList(nn.Conv2d(dim, dim, s, s) if s > 1 else nn.Identity() for s in scales)
        self.reduce_norm = nn.ModuleList(nn.LayerNorm(dim, eps=1e-5) if s > 1 else nn.Identity() for s in scales)
        self.kv = nn.ModuleList(nn.Linear(dim, 2 * dim // len(scales)) for _ in scales)
        self.proj_in = nn.Linear(dim, 2 * dim)  # queries of all groups, local term
        self.local = DepthwiseConv(dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As in :class:`HybridScaleAttention`; coarse sums over groups with s_j > 1, fine over those with s_j = 1."""
        C = x.shape[-1]
        queries, local = self.proj_in(x).split((C, C), dim=-1)
        queries = queries.chunk(len(self.scales), -1)
        outs, coarse, fine = [], x.new_zeros(()), x.new_zeros(())
        groups = zip(self.scales, self.reduce, self.reduce_norm, self.kv, strict=True)
        for j, (scale, reduce, norm, kv) in enumerate(groups):
            keys = x if scale == 1 else reduce_grid(x, scale, reduce, norm)
            out, received = outside_graph(
                attend_scale,
                queries[j],
                kv(keys),
                self.heads,
                scale,
                self.window,
                scale > 1 and self.coarse == "global",
            )
            outs.append(out)
            coarse, fine = (coarse + received, fine) if scale > 1 else (coarse, fine + received)
        out = torch.cat(outs, dim=-1) + convolve(self.local, local.contiguous())
        return self.proj(out), coarse.expand_as(received), fine.expand_as(received)


def reduce_grid(x: Tensor, r: int, conv: nn.Module, norm: nn.Module) -> Tensor:
    """(B, H, W, C) -> (B, ceil(H / r), ceil(W / r), C): strided convolution of the zero-padded grid, norm, GELU."""
    return F.gelu(norm(convolve(conv, pad_grid(x, r))))


# Padding, windows and groups depend on the size of the grid, which symbolic tracing (torchvision's feature extraction)
# does not know: functions that read it are one step to it.
@fx.wrap
def pad_grid(x: Tensor, r: int) -> Tensor:
    """(B, H, W, C), with zeros to the right and below up to multiples of r."""
    _, H, W, _ = x.shape
    height, width = ceil_to(H, r), ceil_to(W, r)
    return x if known(height == H) and known(width == W) else F.pad(x, (0, 0, 0, width - W, 0, height - H))


@fx.wrap
def attend_scale(
    q: Tensor, kv: Tensor, heads: int, scale: int, window: int, is_global: bool = False
) -> tuple[Tensor, Tensor]:
    """Attention of one scale's heads: queries (B, H, W, D), keys and values (B, ceil(H / scale), ceil(W / scale), 2 D).

    Attention is global, or within windows of ``window`` x ``window`` keys and the queries they cover. Returns the
    output (B, H, W, D) and each token's significance (B, H, W): the attention received by its key.
    """
    grid = q.shape[1:3]
    if is_global:
        key_window, query_window = (kv.shape[1], kv.shape[2]), (grid[0], grid[1])
    else:
        key_window, query_window = (window, window), (window * scale, window * scale)
    out, received = ops.attend_windows(q, kv, heads, query_window, key_window)
    significance = received / (query_window[0] * query_window[1])
    return out, significance if scale == 1 else ops.enlarge(significance, scale, (grid[0], grid[1]))


class SelfGuidedAttention(nn.Module):
    """All tokens attend to a few pooled tokens, which are dense where significance is high (section 3.3).

    Tokens are sorted by significance and split into regions; in region i every r_i neighbours in sorted order form one
    key/value token, by a learned linear map over positions or another ``aggregation`` (significance.py).

    Args:
        dim: channels; a multiple of ``heads``.
        regions: least significant first.
        aggregation, attention: see :class:`~sgformer.models.config.SGFormerConfig`.
        local: the class of the local term's convolution.
        convolve: how it is applied to tokens; it determines whether these are (H, W) or (N,).
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        regions: Sequence[Region],
        aggregation: str = "linear",
        attention: str = "softmax",
        local: type[nn.Module] = DepthwiseConv,
        convolve: Callable[[nn.Module, Tensor], Tensor] = convolve,
    ):
        super().__init__()
        self.heads, self.convolve = heads, convolve
        self.attend = ops.attend if attention == "softmax" else ops.attend_linearly
        self.aggregate = AGGREGATIONS[aggregation](regions)
        self.proj_in = nn.Linear(dim, 2 * dim)  # queries, local term
        self.kv = nn.Linear(dim, 2 * dim)
        self.local = local(dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, significance: Tensor) -> tuple[Tensor, list[Tensor]]:
        """(B, H, W, C) and (B, H, W) -> the output (B, H, W, C), and the grouping of tokens, for ``describe``."""
        C = x.shape[-1]
        q, local = self.proj_in(x).split((C, C), dim=-1)
        pooled, grouped = outside_graph(self.aggregate, x.flatten(1, -2), significance.flatten(1))
        k, v = self.kv(pooled).chunk(2, dim=-1)
        out = self.attend(*(ops.split_heads(t, self.heads) for t in (q.flatten(1, -2), k, v)))
        return self.proj(ops.join_heads(out).view_as(x) + self.convolve(self.local, local)), grouped

    def describe(self, grouped: list[Tensor], grid: tuple[int, ...]) -> TokenGroups | MergedTokens:
        return self.aggregate.describe(grouped, grid)


class PlainAttention(nn.Module):
    """Global self-attention of the last stage; (B, H, W, C) to the same."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.proj_in = nn.Linear(dim, 4 * dim)  # queries, keys, values, local term
        self.local = DepthwiseConv(dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        _, H, W, C = x.shape
        qkv, local = self.proj_in(x).split((3 * C, C), dim=-1)
        q, k, v = qkv.flatten(1, 2).chunk(3, dim=-1)
        q, k, v = (ops.split_heads(t, self.heads) for t in (q, k, v))
        return self.proj(ops.join_heads(ops.attend(q, k, v)).unflatten(1, (H, W)) + convolve(self.local, local))


class Block(nn.Module):
    """Pre-norm residual block of attention and MLP. Subclasses differ in the attention."""

    def __init__(self, dim: int, attn: nn.Module, config: SGFormerConfig, drop_path: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = attn
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, config.mlp_ratio)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def add(self, x: Tensor, out: Tensor) -> Tensor:
        return self.feed_forward(x + self.drop_path(out))

    def feed_forward(self, x: Tensor) -> Tensor:
        return x + self.drop_path(self.mlp(self.norm2(x)))


class HybridBlock(Block):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        out, coarse, fine = self.attn(self.norm1(x))
        return self.add(x, out), coarse, fine


class GuidedBlock(Block):
    """Also selects the source of significance: by default the sum of the previous hybrid-scale block's two terms."""

    def __init__(self, dim: int, attn: nn.Module, config: SGFormerConfig, drop_path: float):
        super().__init__(dim, attn, config, drop_path)
        self.source = make_source(config.significance, dim)

    def forward(self, x: Tensor, coarse: Tensor, fine: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        significance = self.source(x, coarse, fine)
        tokens = self.norm1(x)
        if isinstance(self.source, nn.Module):
            tokens = gate(tokens, significance)
        out, grouped = self.attn(tokens, significance)
        return self.add(x, out), significance, grouped


class PlainBlock(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.add(x, self.attn(self.norm1(x)))


def run_part(owner: nn.Module, part: nn.Module, *args: Any) -> Any:
    """``part(*args)``, checkpointed if ``owner`` is in training with gradient checkpointing."""
    if owner.grad_checkpointing and owner.training:
        return checkpoint(part, *args, use_reentrant=False)
    return part(*args)


class Stage(nn.Module):
    """Downsampling (except in the first stage), blocks, norm: (B, C_in, H, W) -> (B, C, ceil(H / 2), ceil(W / 2))."""

    def __init__(self, stage: StageConfig, dim_in: int | None, config: SGFormerConfig, drop_path: Sequence[float]):
        super().__init__()
        dim, r = stage.dim, stage.reduction
        self.downsample = nn.Identity() if dim_in is None else Downsample(dim_in, dim)
        self.blocks = nn.ModuleList()
        for i, rate in enumerate(drop_path):
            if r is None:
                self.blocks.append(PlainBlock(dim, PlainAttention(dim, stage.heads), config, rate))
            elif i % 2 == 0 or config.pairs == "hybrid":
                self.blocks.append(HybridBlock(dim, self._hybrid(stage, config), config, rate))
            elif config.pairs == "guided":
                guided = SelfGuidedAttention(dim, stage.heads, stage.regions, config.aggregation, config.attention)
                self.blocks.append(GuidedBlock(dim, guided, config, rate))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.grad_checkpointing = False

    def forward(self, x: Tensor, inspection: Inspection | None = None, name: str = "") -> Tensor:
        x = run_part(self, self.downsample, x.permute(0, 2, 3, 1).contiguous())
        for i, block in enumerate(self.blocks):
            key = f"{name}.{i}"
            if isinstance(block, HybridBlock):
                x, coarse, fine = run_part(self, block, x)
                if inspection is not None:
                    inspection.significance[key], inspection.coarse[key], inspection.fine[key] = (
                        coarse + fine,
                        coarse,
                        fine,
                    )
            elif isinstance(block, GuidedBlock):
                x, significance, grouped = run_part(self, block, x, coarse, fine)
                if inspection is not None:
                    inspection.significance[f"{name}.{i - 1}"] = significance.detach()
                    inspection.tokens[key] = block.attn.describe(grouped, (x.shape[1], x.shape[2]))
            else:
                x = run_part(self, block, x)
        return self.norm(x).permute(0, 3, 1, 2)

    @staticmethod
    def _hybrid(stage: StageConfig, config: SGFormerConfig) -> nn.Module:
        if stage.scales:
            return MultiScaleAttention(stage.dim, stage.heads, stage.scales, config.window, config.coarse)
        return HybridScaleAttention(stage.dim, stage.heads, stage.reduction, config.window, config.coarse)


class SGFormer(nn.Module):
    """The self-guided vision transformer, with timm's model interface.

    Args:
        config: the network's hyperparameters; ``sgformer.models.config.VARIANTS`` holds the published sizes.
        global_pool: "avg", or "" for no pooling, which keeps the feature map.
        device, dtype: device and dtype of the parameters; "meta" allocates nothing.
    """

    def __init__(
        self,
        config: SGFormerConfig,
        global_pool: str = "avg",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if not isinstance(config, SGFormerConfig):
            raise TypeError(
                f"SGFormer takes an SGFormerConfig (got {type(config).__name__}); sizes by name: sgformer.create_model"
            )
        self.config = config
        dims = [stage.dim for stage in config.stages]
        self.num_classes, self.in_chans, self.global_pool = config.num_classes, config.in_chans, global_pool
        self.num_features = self.head_hidden_size = dims[-1]
        self.feature_info = [
            {"num_chs": dim, "reduction": 4 * 2**i, "module": f"stages.{i}"} for i, dim in enumerate(dims)
        ]
        total = sum(stage.depth for stage in config.stages)
        rates = iter([config.drop_path_rate * i / max(1, total - 1) for i in range(total)])
        with created_on(device, dtype):
            self.stem = Stem(config.in_chans, dims[0], config.img_size)
            stages = (
                Stage(stage, dims[i - 1] if i else None, config, [next(rates) for _ in range(stage.depth)])
                for i, stage in enumerate(config.stages)
            )
            self.stages = nn.Sequential(*stages)
            self.head = ClassifierHead(dims[-1], config.num_classes, global_pool, config.drop_rate)
        self.grad_checkpointing = False
        self.init_weights()

    @torch.no_grad()
    def init_weights(self, needs_reset: bool = True) -> None:
        """Initialise every parameter, once, from the root (also after ``to_empty`` on a meta-device model)."""
        self.apply(init_module)

    # -- forward ------------------------------------------------------------------------------------------------

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) with H, W >= 32 -> (B, num_classes)."""
        return self.forward_head(self.forward_features(x))

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) -> the last stage's feature map, (B, C, ceil(H / 32), ceil(W / 32))."""
        x = run_part(self, self.stem, x)
        for stage in self.stages:
            x = stage(x)
        return x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        return self.head(x, pre_logits=pre_logits)

    def inspect(self, x: Tensor) -> Inspection:
        """One forward pass that also returns the four feature maps, the significance maps and the token groups."""
        inspection = Inspection()
        x = run_part(self, self.stem, x)
        for i, stage in enumerate(self.stages, start=1):
            x = stage(x, inspection, str(i))
            inspection.features.append(x)
        inspection.logits = self.forward_head(inspection.features[-1])
        return inspection

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Feature maps of the stages in ``indices`` (None: all; n: the last n), preceded by the final map unless
        ``intermediates_only``. Every stage ends with its norm, so ``norm`` has no effect; ``output_fmt`` is "NCHW" or
        "NHWC"."""
        if output_fmt not in ("NCHW", "NHWC"):
            raise ValueError(f"output_fmt must be NCHW or NHWC (got {output_fmt!r})")
        take = self._take(indices)
        x = run_part(self, self.stem, x)
        maps = []
        for i, stage in enumerate(self.stages):
            if stop_early and i > max(take):
                break
            x = stage(x)
            if i in take:
                maps.append(x if output_fmt == "NCHW" else x.permute(0, 2, 3, 1))
        return maps if intermediates_only else (x, maps)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the stages above the last one in ``indices`` (and the head); returns the indices kept.

        A stage's norm is part of its feature map, so ``prune_norm`` has no effect.
        """
        take = self._take(indices)
        self.stages = self.stages[: max(take) + 1]
        if prune_head:
            self.reset_classifier(0, "")
        return take

    def _take(self, indices: int | list[int] | None) -> list[int]:
        n = len(self.stages)
        if indices is None or isinstance(indices, int):
            indices = list(range(n if indices is None else -indices, 0)) if indices else list(range(n))
        take = [i + n if i < 0 else i for i in indices]
        if not take or min(take) < 0 or max(take) >= n:
            raise ValueError(f"stage indices must be within -{n}..{n - 1} (got {list(indices)})")
        return take

    @property
    def token_budget(self) -> float:
        """See :meth:`set_token_budget`; 1 as built and trained."""
        return token_budget(self)

    def set_token_budget(self, budget: float) -> None:
        """Make fewer or more key/value tokens from now on; see :func:`sgformer.set_token_budget`."""
        set_token_budget(self, budget)

    # -- interface for timm and training ------------------------------------------------------------------------

    def get_classifier(self) -> nn.Module:
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        self.num_classes = num_classes
        self.global_pool = self.global_pool if global_pool is None else global_pool
        self.config = self.config.replace(num_classes=num_classes)
        parameter = next(self.parameters())
        self.head.reset(num_classes, global_pool)
        self.head.apply(init_module).to(parameter.device, parameter.dtype)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Save memory in training: keep only the inputs of the stem, of each downsampling and of each block, and
        recompute the rest in the backward pass."""
        self.grad_checkpointing = enable
        for stage in self.stages:
            stage.grad_checkpointing = enable

    def no_weight_decay(self) -> set[str]:
        return {"stem.position.table"}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Parameter patterns of the layers from input to output, for timm's layer-wise learning-rate decay."""
        blocks = [(r"^stages\.(\d+)\.(?:downsample)", (0,)), (r"^stages\.(\d+)\.blocks\.(\d+)", None)]
        fine = [*blocks, (r"^stages\.(\d+)\.norm", (99999,))]
        return {"stem": r"^stem", "blocks": r"^stages\.(\d+)" if coarse else fine}
