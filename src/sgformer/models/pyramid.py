"""What the dense tasks share: any backbone with four feature maps, and files that hold backbone and heads together."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from json import dumps
from typing import Any

import timm
from timm.models import group_parameters
from torch import Tensor, nn

import sgformer.models.registry  # noqa: F401 - registers the sizes with timm
from sgformer.core.errors import UserError
from sgformer.models import checkpoint
from sgformer.models.backbone import SGFormer
from sgformer.models.config import VARIANTS, SGFormerConfig
from sgformer.models.load import build_model, find_weights, load_weights

STRIDES = (4, 8, 16, 32)
DENSE = "sgformer-dense"  # the "format" of files that hold a backbone with its heads


class Pyramid(nn.Module):
    """A backbone's four feature maps.

    Args:
        network: a whole network of timm's interface (`forward_intermediates`, `feature_info`); what comes after its
            last map is removed.
        freeze_stages: stem and this many stages keep their weights and statistics; -1 trains everything, 0 freezes the
            stem alone.

    Attributes:
        channels: of each map.
        strides: of each map, in pixels: (4, 8, 16, 32).
        architecture: a plain dict from which `pyramid_backbone` builds the same network again.

    Raises:
        UserError: the network has no four maps of strides 4, 8, 16 and 32, or not so many stages to freeze.
    """

    def __init__(self, network: nn.Module, freeze_stages: int = -1):
        super().__init__()
        self.architecture = _architecture(network)
        info = list(network.feature_info)  # type: ignore[arg-type]
        places = [i for i, entry in enumerate(info) if entry["reduction"] in STRIDES]
        if not hasattr(network, "forward_intermediates") or [info[i]["reduction"] for i in places] != list(STRIDES):
            strides = ", ".join(str(entry["reduction"]) for entry in info)
            raise UserError(
                f"{self.architecture['model']} does not give one map at each of the strides 4, 8, 16 and 32 "
                f"(it gives {strides or 'none'}); pick a hierarchical network"
            )
        self.channels = tuple(int(info[i]["num_chs"]) for i in places)
        self.strides = STRIDES
        prune = getattr(network, "prune_intermediate_layers", None)
        # In DDP every parameter must get a gradient: what comes after the maps goes.
        self.places = prune(places, prune_norm=True) if prune else places
        self.network = network
        self._freeze(freeze_stages)

    def forward(self, x: Tensor) -> list[Tensor]:
        """(B, 3, H, W) -> four maps (B, channels[i], ceil(H / strides[i]), ceil(W / strides[i]))."""
        run = self.network.forward_intermediates
        return run(x, indices=self.places, output_fmt="NCHW", intermediates_only=True)  # type: ignore[operator]

    def train(self, mode: bool = True) -> Pyramid:
        """Training mode, but not of frozen parts: there neither batch statistics nor drop path move."""
        super().train(mode)
        for module in self.network.modules():
            parameters = list(module.parameters())
            if parameters and not any(p.requires_grad for p in parameters):
                module.eval()
        return self

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that do not decay, besides norms and biases."""
        network = self.network
        names = network.no_weight_decay() if hasattr(network, "no_weight_decay") else set()  # type: ignore[operator]
        return {f"network.{name}" for name in names}

    def _freeze(self, stages: int) -> None:
        if stages < 0:
            return
        network = self.network
        if not hasattr(network, "group_matcher"):
            raise UserError(f"{self.architecture['model']} does not name its stages: it cannot be frozen in part")
        layers = group_parameters(network, network.group_matcher(coarse=True), reverse=True)  # type: ignore[operator]
        if stages > len(STRIDES):
            raise UserError(f"--freeze-stages is -1 (nothing) to {len(STRIDES)} (everything), got {stages}")
        for name, parameter in network.named_parameters():
            if layers[name] <= stages:
                parameter.requires_grad_(False)


def pyramid_backbone(
    source: str | Mapping[str, Any] | nn.Module,
    *,
    weights: str | os.PathLike[str] | None = None,
    drop_path: float = 0.0,
    coarse: str | None = None,
    guidance: Mapping[str, Any] | None = None,
    freeze_stages: int = -1,
    grad_checkpointing: bool = False,
) -> Pyramid:
    """A backbone with four feature maps, NCHW at strides 4, 8, 16 and 32.

    Args:
        source: a name (`sgformer_n` ... `sgformer_b`, or any of timm's), a `Pyramid.architecture`, or a network.
        weights: of a classification run, a `.safetensors` file or a released `.pth`, for the same network; the
            classifier in it is left out.
        drop_path: stochastic depth.
        coarse: reach of SG-Former's coarse heads, "global" or "window"; by default the network's own.
        guidance: other fields of SG-Former's config (`RunConfig.guidance`).
        freeze_stages: see `Pyramid`.
        grad_checkpointing: less memory, more time.

    Raises:
        UserError: no such network or weights, weights of another network, or a network without such maps.
    """
    if isinstance(source, nn.Module):
        network = source
    elif weights is not None:
        name = source if isinstance(source, str) else source["model"]
        network = _with_weights(name, weights, **_options(name, drop_path, coarse, guidance))
    elif isinstance(source, str):
        network = _fresh(source, **_options(source, drop_path, coarse, guidance))
    else:
        options = _options(source["model"], drop_path, coarse, guidance)
        if "config" in source:
            network = SGFormer(SGFormerConfig.from_dict(source["config"]).replace(**options))
            network.pretrained_cfg = {"architecture": source["model"]}  # type: ignore[assignment]
        else:
            network = _fresh(source["model"], **options)
    if grad_checkpointing:
        network.set_grad_checkpointing(True)  # type: ignore[operator]
    return Pyramid(network, freeze_stages).train()


def save_dense(network: nn.Module, path: str | os.PathLike[str], metadata: Mapping[str, Any]) -> None:
    """Write a backbone with its heads to a safetensors file, whole or not at all.

    Args:
        network: its `architecture` is a plain dict that says how to build it; stored as metadata["architecture"].
        metadata: anything JSON can hold; `task` names the task.
    """
    about = {**metadata, "architecture": network.architecture}
    tensors = {name: value.detach().cpu().contiguous().clone() for name, value in network.state_dict().items()}
    checkpoint.write_safetensors(tensors, path, {"format": DENSE, "metadata": dumps(about)})


def load_dense(path: str | os.PathLike[str], task: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and metadata of a run folder or file that `save_dense` wrote.

    Raises:
        UserError: no such file, damaged, or weights of something else than this task.
    """
    path = find_weights(path)
    tensors, header = checkpoint.read_safetensors(path)
    metadata = checkpoint.read_metadata(path)
    if header.get("format") != DENSE or metadata.get("task") != task:
        raise UserError(f"{path}: holds weights for {metadata.get('task', 'a backbone')}, not for {task}")
    return tensors, metadata


def is_dense(path: str | os.PathLike[str], task: str) -> bool:
    """Whether a run folder or weights file holds a whole network for this task (and not a backbone alone)."""
    file = find_weights(path)
    if file.suffix != ".safetensors" or checkpoint.read_header(file).get("format") != DENSE:
        return False
    return checkpoint.read_metadata(file).get("task") == task


def decay_groups(network: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """The network's trainable parameters for an optimiser: no decay on norms and on `network.no_weight_decay()`."""
    keep = set(network.no_weight_decay())  # type: ignore[operator]
    for name, module in network.named_modules():
        if "Norm" in type(module).__name__:
            keep |= {f"{name}.{leaf}" for leaf, _ in module.named_parameters(recurse=False)}
    named = [(name, p) for name, p in network.named_parameters() if p.requires_grad]
    return [
        {"params": [p for name, p in named if name not in keep], "weight_decay": weight_decay},
        {"params": [p for name, p in named if name in keep], "weight_decay": 0.0},
    ]


def _options(name: str, drop_path: float, coarse: str | None, guidance: Mapping[str, Any] | None) -> dict[str, Any]:
    if name in VARIANTS:
        return {"drop_path_rate": drop_path, **({"coarse": coarse} if coarse else {}), **(guidance or {})}
    return {"drop_path_rate": drop_path} if drop_path else {}


def _fresh(name: str, **options: Any) -> nn.Module:
    if name not in VARIANTS and timm.is_model(name):
        with suppress(TypeError):  # window transformers of timm insist on their training size unless told otherwise
            return timm.create_model(name, num_classes=0, strict_img_size=False, **options)
    return build_model(name, 0, **options)


def _with_weights(name: str, weights: str | os.PathLike[str], **options: Any) -> nn.Module:
    network, metadata = load_weights(weights, num_classes=0, **options)
    held = metadata.get("model") or _name(network)
    if held != name:
        raise UserError(f"{weights} holds {held}, not --model {name}")
    return network


def _name(network: nn.Module) -> str:
    """The network's name in timm's registry."""
    if isinstance(network, SGFormer):  # regions and scales may be a user's own: the size still has its name
        size = _size(network.config)
        return next((name for name, config in VARIANTS.items() if _size(config) == size), "sgformer")
    return (getattr(network, "pretrained_cfg", None) or {}).get("architecture", type(network).__name__)


def _size(config: SGFormerConfig) -> list[tuple[int, int, int]]:
    return [(stage.dim, stage.heads, stage.depth) for stage in config.stages]


def _architecture(network: nn.Module) -> dict[str, Any]:
    held: dict[str, Any] = {"model": _name(network)}
    if isinstance(network, SGFormer):
        held["config"] = network.config.replace(num_classes=0).to_dict()
    return held
