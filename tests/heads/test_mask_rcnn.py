import pytest
import torch

from sgformer.heads.mask_rcnn import Anchors, RCNNHeads, paste_masks

STRIDES = (4, 8, 16, 32)
CHANNELS = (8, 12, 16, 20)


def maps(height, width, batch=1):
    return [torch.randn(batch, c, -(-height // s), -(-width // s)) for c, s in zip(CHANNELS, STRIDES, strict=True)]


def test_anchors_are_eight_strides_wide_and_stand_at_true_strides():
    levels = [torch.zeros(1, 4, h, w) for h, w in ((24, 40), (12, 20), (6, 10), (3, 5), (2, 3))]
    from torchvision.models.detection.image_list import ImageList

    anchors = Anchors([*STRIDES, 64])(ImageList(torch.zeros(1, 3, 96, 160), [(96, 160)]), levels)[0]
    assert len(anchors) == 3 * sum(m.shape[-2] * m.shape[-1] for m in levels)
    last = anchors[-3 * 6 :].reshape(2, 3, 3, 4)  # rows, columns, ratios, box
    centres = (last[..., :2] + last[..., 2:]) / 2
    assert torch.equal(centres[:, :, 0, 0], torch.tensor([[0.0, 64, 128]] * 2))
    assert torch.equal(centres[:, 0, 0, 1], torch.tensor([0.0, 64]))
    sides = last[..., 2:] - last[..., :2]
    assert torch.allclose(sides.prod(-1).sqrt(), torch.tensor(512.0), rtol=0.01)
    assert torch.allclose(sides[0, 0, :, 1] / sides[0, 0, :, 0], torch.tensor([0.5, 1.0, 2.0]), rtol=0.01)


def test_the_standard_settings():
    heads = RCNNHeads(CHANNELS, STRIDES, 80)
    roi, rpn = heads.roi_heads, heads.rpn
    assert (roi.score_thresh, roi.nms_thresh, roi.detections_per_img) == (0.05, 0.5, 100)
    assert (rpn.nms_thresh, rpn._pre_nms_top_n, rpn._post_nms_top_n["testing"]) == (
        0.7,
        {"training": 2000, "testing": 1000},
        1000,
    )
    assert (roi.fg_bg_sampler.batch_size_per_image, roi.fg_bg_sampler.positive_fraction) == (512, 0.25)
    assert roi.box_predictor.cls_score.weight.shape == (81, 1024) and roi.box_head.fc6.weight.shape == (1024, 256 * 49)
    assert roi.mask_predictor.mask_fcn_logits.weight.shape == (81, 256, 1, 1)
    assert len(heads.fpn.inner_blocks) == 4 and roi.mask_roi_pool.output_size == (14, 14)


@pytest.mark.parametrize("masks", [True, False])
def test_losses_in_training_and_detections_in_evaluation(masks):
    heads = RCNNHeads(CHANNELS, STRIDES, 3, masks, width=16, rois=16)
    features = [m.requires_grad_() for m in maps(64, 96)]
    batch = torch.zeros(1, 3, 64, 96)
    target = {"boxes": torch.tensor([[8.0, 8, 40, 40]]), "labels": torch.tensor([2])}
    target["masks"] = torch.zeros(1, 64, 90, dtype=torch.uint8)
    target["masks"][:, 10:40, 8:40] = 1
    detections, losses = heads(features, batch, [(64, 90)], [target])
    names = {"loss_objectness", "loss_rpn_box_reg", "loss_classifier", "loss_box_reg"}
    assert detections == [] and set(losses) == names | ({"loss_mask"} if masks else set())
    sum(losses.values()).backward()
    assert all(m.grad is not None and m.grad.isfinite().all() for m in features)
    assert [n for n, p in heads.named_parameters() if p.grad is None] == []
    heads.eval().roi_heads.score_thresh = 0.0
    detections, losses = heads(features, batch, [(64, 90)])
    assert losses == {}
    boxes = detections[0]["boxes"]
    assert len(boxes) and boxes.min() >= 0 and boxes[:, 2].max() <= 90 and boxes[:, 3].max() <= 64
    assert set(detections[0]["labels"].tolist()) <= {1, 2, 3}
    assert ("masks" in detections[0]) == masks


def test_an_image_without_objects_has_losses_too():
    heads = RCNNHeads(CHANNELS, STRIDES, 3, width=16, rois=16)
    target = {
        "boxes": torch.zeros(0, 4),
        "labels": torch.zeros(0, dtype=torch.int64),
        "masks": torch.zeros(0, 64, 64, dtype=torch.uint8),
    }
    losses = heads(maps(64, 64), torch.zeros(1, 3, 64, 64), [(64, 64)], [target])[1]
    assert all(value.isfinite() for value in losses.values())
    assert losses["loss_mask"] == 0 and losses["loss_box_reg"] == 0 and losses["loss_classifier"] > 0


def test_boxes_stay_float32_under_mixed_precision():
    heads = RCNNHeads(CHANNELS, STRIDES, 3, width=16, rois=16).eval()
    heads.roi_heads.score_thresh = 0.0
    with torch.autocast("cpu", torch.bfloat16):
        found = heads(maps(64, 64), torch.zeros(1, 3, 64, 64), [(64, 64)])[0][0]
    assert found["boxes"].dtype == found["scores"].dtype == torch.float32


def test_masks_are_laid_where_their_boxes_are():
    whole = torch.ones(2, 1, 28, 28)
    whole[1, :, :, :14] = 0  # the right half of its box
    first, second = paste_masks(whole, torch.tensor([[10.0, 5, 30, 25], [40, 0, 60, 20]]), (40, 64))
    expected = torch.zeros(40, 64, dtype=torch.bool)
    expected[5:25, 10:30] = True
    assert first.shape == (40, 64) and (first != expected).sum() <= 4 * 21  # up to a pixel of rim
    assert second[2:18, 52:59].all() and not second[:, :48].any()
    assert list(paste_masks(torch.zeros(0, 1, 28, 28), torch.zeros(0, 4), (40, 64))) == []
