import copy

import pytest
import torch
from test_mask_rcnn import CHANNELS, STRIDES, maps
from torchvision.models.detection.keypoint_rcnn import KeypointRCNNPredictor

from sgformer.heads.keypoint_rcnn import KeypointHeads

SIZE = (64, 90)
TARGET = {
    "boxes": torch.tensor([[8.0, 8, 40, 40]]),
    "labels": torch.tensor([2]),
    "keypoints": torch.tensor([[[10.0, 10, 1], [30, 20, 1], [39, 39, 1], [0, 0, 0], [20, 30, 1]]]),
}


def small(**more):
    return KeypointHeads(CHANNELS, STRIDES, 3, 5, **{"width": 16, "rois": 16, **more})


def test_the_standard_settings():
    roi = KeypointHeads(CHANNELS, STRIDES, 1, 17).roi_heads
    assert [m.out_channels for m in roi.keypoint_head if hasattr(m, "out_channels")] == [512] * 8
    assert roi.keypoint_predictor.kps_score_lowres.weight.shape == (512, 17, 4, 4)
    assert roi.keypoint_roi_pool.output_size == (14, 14) and not roi.has_mask()
    assert roi.box_predictor.cls_score.weight.shape == (2, 1024)


def test_losses_in_training_and_keypoints_in_evaluation():
    heads, features = small(), [m.requires_grad_() for m in maps(64, 96)]
    detections, losses = heads(features, torch.zeros(1, 3, 64, 96), [SIZE], [TARGET])
    names = {"loss_objectness", "loss_rpn_box_reg", "loss_classifier", "loss_box_reg", "loss_keypoint"}
    assert detections == [] and set(losses) == names
    sum(losses.values()).backward()
    assert [n for n, p in heads.named_parameters() if p.grad is None] == []
    heads.eval().roi_heads.score_thresh = 0.0
    (found,), losses = heads(features, torch.zeros(1, 3, 64, 96), [SIZE])
    assert losses == {} and set(found) == {"boxes", "labels", "scores", "keypoints"}
    points, boxes = found["keypoints"].detach(), found["boxes"].detach()
    assert points.shape == (len(boxes), 5, 3) and points[..., 2].min() > 0 and points[..., 2].max() <= 1
    sides = (boxes[:, 2:] - boxes[:, :2]).clamp(min=1)[:, None]
    inside = (points[..., :2] >= boxes[:, None, :2]) & (points[..., :2] <= boxes[:, None, :2] + sides + 1e-3)
    assert inside.all()


def test_loss_and_places_are_torchvision_s_and_scores_are_probabilities():
    torch.manual_seed(0)
    ours = small()
    theirs = copy.deepcopy(ours)
    theirs.roi_heads.keypoint_predictor.__class__ = KeypointRCNNPredictor  # logits as they are
    features, batch = maps(64, 96), torch.zeros(1, 3, 64, 96)
    losses = []
    for heads in (ours, theirs):
        torch.manual_seed(1)  # for the proposals that are sampled
        losses.append(heads(features, batch, [SIZE], [TARGET])[1]["loss_keypoint"].item())
        heads.eval().roi_heads.score_thresh = 0.0
    assert losses[0] == pytest.approx(losses[1], rel=1e-5) and losses[0] > 0
    with torch.no_grad():
        (found,), (other,) = (heads(features, batch, [SIZE])[0] for heads in (ours, theirs))
        cells = ours.roi_heads.keypoint_predictor(torch.randn(2, 32, 14, 14)).exp()
    assert torch.allclose(found["keypoints"][..., :2], other["keypoints"][..., :2], atol=1e-4)
    assert cells.shape == (2, 5, 56, 56) and torch.allclose(cells.sum((-2, -1)), torch.ones(2, 5), atol=1e-4)


def test_an_object_without_keypoints_has_a_loss_of_none():
    hidden = {**TARGET, "keypoints": torch.zeros(1, 5, 3)}
    losses = small()(maps(64, 96), torch.zeros(1, 3, 64, 96), [SIZE], [hidden])[1]
    assert losses["loss_keypoint"] == 0 and losses["loss_box_reg"] > 0
