"""The heads by name. A new one is a file in this folder, or a plugin; see `register_head` and `register_detector`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sgformer.core.registry import Registry

HEADS = Registry("segmentation head", "sgformer.heads", "register_head")
DETECTORS = Registry("detector", "sgformer.heads", "register_detector")


def register_head(name: str) -> Callable[[Any], Any]:
    """Decorator: add a segmentation head under a name, for `sgformer train segment --head NAME`.

    The head is an ``nn.Module`` class, called as ``Head(channels, strides, num_classes, dim=STANDARD)``: with channels
    and strides of the four maps, finest first, and the head's width, which has a default.
    Its ``forward`` maps the list of them, (B, channels[i], H / strides[i], W / strides[i]), to class logits
    (B, num_classes, h, w) of any height and width, which are resized to the image's. A method ``auxiliary`` of the same
    kind, if there is one, returns logits for an auxiliary loss.

    Weights store the name, so it must be registered before they are loaded.

    Raises:
        ValueError: the name is taken by another head.
    """
    return HEADS.register(name)


def register_detector(name: str) -> Callable[[Any], Any]:
    """Decorator: add a detector's heads under a name, for `sgformer train detect --head NAME`.

    The heads are an ``nn.Module`` class, called as ``Heads(channels, strides, num_classes, width, **options)``: with
    channels and strides of the four maps, finest first, the number of classes without the background, and the width of
    the heads; the option is `rois`, which a class may ignore. It has

    * ``masks``: an attribute of the class, whether it also predicts masks;
    * ``forward(maps, batch, sizes, targets)``, which returns detections and losses like
      :meth:`sgformer.heads.mask_rcnn.RCNNHeads.forward`;
    * ``fpn``: a module from ``{"0": map, ...}`` to a dict of pyramid levels, which exports to `.pt2` contain.

    Weights store the name, so it must be registered before they are loaded.

    Raises:
        ValueError: the name is taken by another detector.
    """
    return DETECTORS.register(name)
