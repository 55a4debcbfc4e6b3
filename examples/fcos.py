"""FCOS (Tian et al., ICCV 2019), a detector of boxes without proposals, from the parts of torchvision. A plugin:

sgformer --plugin examples/fcos.py train detect --head fcos --data coco
"""

import torch
from torch import nn
from torchvision.models.detection import FCOS
from torchvision.models.detection.image_list import ImageList
from torchvision.ops.feature_pyramid_network import FeaturePyramidNetwork, LastLevelP6P7

import sgformer
from sgformer.heads.mask_rcnn import Anchors


class Pyramid(FeaturePyramidNetwork):
    """Levels of strides 8 to 128, from all maps but the first."""

    def forward(self, maps):
        """{"0": (B, channels[0], H / 4, W / 4), ...} -> a dict of five (B, width, h, w)."""
        return super().forward({name: m for name, m in maps.items() if name != "0"})


@sgformer.register_detector("fcos")
class FCOSHeads(nn.Module):
    """A pyramid, and on each of its levels the class, the box and the nearness to its middle at every place.

    At test: score above .05, NMS at .6, at most 100 detections per image. In float32, as the other heads.

    Args:
        channels, strides: of the four maps.
        num_classes: without the background.
        width: of pyramid and head, a multiple of 64: norms count over 32 groups of channels, also on a single place.
    """

    masks = False

    def __init__(self, channels, strides, num_classes, width=256, **_):
        super().__init__()
        if width % 64:
            raise sgformer.UserError(f"--head fcos takes a --head-width in multiples of 64, got {width}")
        self.fpn = Pyramid(list(channels[1:]), width, LastLevelP6P7(width, width))
        stub = nn.Identity()
        stub.out_channels = width
        levels = [*strides[1:], 2 * strides[-1], 4 * strides[-1]]
        anchors = Anchors(levels, scale=1, ratios=(1.0,))
        self.fcos = FCOS(stub, num_classes, anchor_generator=anchors, score_thresh=0.05)

    def forward(self, maps, batch, sizes, targets=None):
        """Detections and losses, as of `RCNNHeads.forward`."""
        levels = self.fpn({str(i): m for i, m in enumerate(maps)}).values()
        with torch.autocast(batch.device.type, enabled=False):
            levels = [level.float() for level in levels]
            found = self.fcos.head(levels)
            anchors = self.fcos.anchor_generator(ImageList(batch.float(), sizes), levels)
            places = [level.shape[-2] * level.shape[-1] for level in levels]
            if self.training:  # torchvision counts FCOS's classes from 0, and those of Mask R-CNN from 1
                targets = [{**target, "labels": target["labels"] - 1} for target in targets]
                return [], self.fcos.compute_loss(targets, found, anchors, places)
            by_level = {name: list(values.split(places, 1)) for name, values in found.items()}
            split = [list(a.split(places)) for a in anchors]
            detections = self.fcos.postprocess_detections(by_level, split, sizes)
        for one in detections:
            one["labels"] = one["labels"] + 1
        return detections, {}
