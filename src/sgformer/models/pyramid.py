"""The backbone of dense tasks: any network with four feature maps."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sgformer.core.errors import UserError, first_line
from sgformer.models.backbone import SGFormer
from sgformer.models.config import VARIANTS, SGFormerConfig
from sgformer.models.load import Weights, build_model, build_network, network_name, read_weights

STRIDES = (4, 8, 16, 32)


class Pyramid(nn.Module):
    """Wraps a backbone to return its four feature maps.

    Args:
        network: a network with timm's interface (`forward_intermediates`, `feature_info`); layers after its last
            feature map are removed.
        freeze_stages: freeze the weights and statistics of the stem and this many stages; -1 freezes nothing, 0 the
            stem only.

    Attributes:
        channels: channels of each map.
        strides: stride of each map in pixels: (4, 8, 16, 32).
        architecture: a JSON-serialisable dict from which `pyramid_backbone` rebuilds the network.

    Raises:
        UserError: the network lacks maps at strides 4, 8, 16 and 32, or has fewer stages than `freeze_stages`.
    """

    def __init__(self, network: nn.Module, freeze_stages: int = -1):
        super().__init__()
        self.architecture = _architecture(network)
        info = list(network.feature_info)  # type: ignore[arg-type]
        places = [i for i, entry in enumerate(info) if entry["reduction"] in STRIDES]
        if not hasattr(network, "forward_intermediates") or [info[i]["reduction"] for i in places] != list(STRIDES):
            strides = ", ".join(str(entry["reduction"]) for entry in info)
            raise UserError(
                f"{self.architecture['model']} does not have one map at each of the strides 4, 8, 16 and 32 "
                f"(it has {strides or 'none'}); pick a hierarchical network"
            )
        self.channels = tuple(int(info[i]["num_chs"]) for i in places)
        self.strides = STRIDES
        prune = getattr(network, "prune_intermediate_layers", None)
        # DDP requires a gradient for every parameter: drop the layers after the maps.
        self.places = prune(places, prune_norm=True) if prune else places
        self.network = network
        self.pads = False
        if not isinstance(network, SGFormer) and not next(network.parameters()).is_meta:
            self.pads = self._needs_padding()
        self._freeze(freeze_stages)

    def forward(self, x: Tensor) -> list[Tensor]:
        """(B, 3, H, W) -> four feature maps (B, channels[i], ceil(H / strides[i]), ceil(W / strides[i])).

        Networks that take multiples of their patches only, such as Swin, see the image padded with zeros to the right
        and below; what the maps hold of the padding is cut off.
        """
        height, width = x.shape[-2:]
        down, right = -height % STRIDES[-1], -width % STRIDES[-1]
        if not self.pads or not (down or right):
            return self._maps(x)
        maps = self._maps(F.pad(x, [0, right, 0, down]))
        return [m[..., : -(-height // s), : -(-width // s)] for m, s in zip(maps, STRIDES, strict=True)]

    def _maps(self, x: Tensor) -> list[Tensor]:
        run = self.network.forward_intermediates
        return run(x, indices=self.places, output_fmt="NCHW", intermediates_only=True)  # type: ignore[operator]

    def _needs_padding(self) -> bool:
        """Whether images must be padded to multiples of 32: timm does not tell, so it is tried.

        Raises:
            UserError: the network refuses those, too.
        """
        like, training = next(self.network.parameters()), self.network.training
        self.network.eval()
        try:
            for padded, size in ((False, (97, 131)), (True, (96, 128))):
                try:
                    with torch.no_grad():
                        self._maps(torch.zeros(1, 3, *size, dtype=like.dtype, device=like.device))
                    return padded
                except (RuntimeError, ValueError, AssertionError, TypeError) as error:
                    reason = first_line(error)
        finally:
            self.network.train(training)
        model = self.architecture["model"]
        raise UserError(f"{model} does not take images of any size ({reason}); pick another hierarchical network")

    def train(self, mode: bool = True) -> Pyramid:
        """Set training mode, except for frozen modules: their batch statistics stay and drop path is off."""
        super().train(mode)
        keep_frozen(self.network)
        return self

    def no_weight_decay(self) -> set[str]:
        """Names of parameters without weight decay, besides norms and biases."""
        network = self.network
        names = network.no_weight_decay() if hasattr(network, "no_weight_decay") else set()  # type: ignore[operator]
        return {f"network.{name}" for name in names}

    def _freeze(self, stages: int) -> None:
        if stages < 0:
            return
        network = self.network
        if not hasattr(network, "group_matcher"):
            raise UserError(f"{self.architecture['model']} does not define its stages, so it cannot be partly frozen")
        from timm.models import group_parameters

        layers = group_parameters(network, network.group_matcher(coarse=True), reverse=True)  # type: ignore[operator]
        if stages > len(STRIDES):
            raise UserError(f"--freeze-stages must be -1 (nothing) to {len(STRIDES)} (everything), got {stages}")
        for name, parameter in network.named_parameters():
            if layers[name] <= stages:
                parameter.requires_grad_(False)


def keep_frozen(network: nn.Module) -> None:
    """Set evaluation mode for the modules of a network whose weights are all frozen."""
    for module in network.modules():
        parameters = list(module.parameters())
        if parameters and not any(p.requires_grad for p in parameters):
            module.eval()


def pyramid_backbone(
    source: str | Mapping[str, Any] | nn.Module,
    *,
    weights: str | os.PathLike[str] | Weights | None = None,
    drop_path: float = 0.0,
    coarse: str | None = None,
    guidance: Mapping[str, Any] | None = None,
    freeze_stages: int = -1,
    grad_checkpointing: bool = False,
) -> Pyramid:
    """Build a backbone with four feature maps, NCHW at strides 4, 8, 16 and 32.

    Args:
        source: a name (`sgformer_n` ... `sgformer_b`, or any of timm's), a `Pyramid.architecture`, or a network.
        weights: of the same network, trained for any task (see `models.load.read_weights`); classifier and heads are
            left out.
        drop_path: stochastic depth.
        coarse: reach of SG-Former's coarse heads, "global" or "window"; None: the network's own.
        guidance: other fields of SG-Former's config (`RunConfig.guidance`).
        freeze_stages: see `Pyramid`.
        grad_checkpointing: less memory, more time.

    Raises:
        UserError: the network or the weights do not exist or do not match, or the network lacks such maps.
    """
    if isinstance(source, nn.Module):
        network = source
    elif weights is not None:
        name = source if isinstance(source, str) else source["model"]
        loaded = weights if isinstance(weights, Weights) else read_weights(weights, name)
        network = build_network(loaded, num_classes=0, partial=True, **_options(name, drop_path, coarse, guidance))
    elif isinstance(source, str):
        network = build_model(source, 0, **_options(source, drop_path, coarse, guidance))
    else:
        options = _options(source["model"], drop_path, coarse, guidance)
        if "config" in source:
            network = SGFormer(SGFormerConfig.from_dict(source["config"]).replace(**options))
            network.pretrained_cfg = {"architecture": source["model"]}  # type: ignore[assignment]
        else:
            network = build_model(source["model"], 0, **options)
    if grad_checkpointing:
        network.set_grad_checkpointing(True)  # type: ignore[operator]
    return Pyramid(network, freeze_stages).train()


def _options(name: str, drop_path: float, coarse: str | None, guidance: Mapping[str, Any] | None) -> dict[str, Any]:
    if name in VARIANTS:
        return {"drop_path_rate": drop_path, **({"coarse": coarse} if coarse else {}), **(guidance or {})}
    return {"drop_path_rate": drop_path} if drop_path else {}


def _architecture(network: nn.Module) -> dict[str, Any]:
    architecture: dict[str, Any] = {"model": network_name(network)}
    if isinstance(network, SGFormer):
        architecture["config"] = network.config.replace(num_classes=0).to_dict()
    return architecture
