"""Image and labels move together; sizes follow the rule; crops are diverse; what is no class stays no class."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision import tv_tensors

from sgformer.data.dense_transforms import (
    DiverseCrop,
    PadTo,
    PhotometricDistortion,
    RatioResize,
    as_tensors,
    normalized,
    train_transform,
)
from sgformer.data.image import fit_size
from sgformer.data.preparing import denormalize


@pytest.mark.parametrize(
    ("height", "width", "factor", "expected"),
    [
        (512, 683, 1.0, (512, 683)),
        (683, 512, 1.0, (683, 512)),  # portrait: the short side counts
        (256, 256, 0.5, (256, 256)),
        (300, 400, 2.0, (1024, 1365)),
        (100, 1000, 1.0, (205, 2048)),  # the long side is the bound
        (10, 400, 0.5, (32, 1024)),  # never below 32
    ],
)
def test_sizes(height, width, factor, expected):
    assert fit_size(height, width, 512, factor) == expected


def coded(labels):
    """An image whose grey value tells the label."""
    return Image.fromarray(np.repeat((labels * 60).astype(np.uint8)[..., None], 3, 2)), labels


def blocks(height=96, width=128, cell=32):
    rows, columns = np.mgrid[:height, :width] // cell
    return (rows * 3 + columns) % 4


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 10**6), crop=st.sampled_from([(64, 64), (64, 96), (200, 160)]))
def test_labels_follow_the_image(seed, crop):
    image, labels = coded(blocks())
    torch.manual_seed(seed)
    pixels, target = train_transform(crop, short_side=96, distortion=False, ignore=255)(image, labels)
    assert pixels.shape == (3, *crop) and target.shape == crop
    assert pixels.dtype == torch.float32 and target.dtype == torch.int64
    known = target != 255
    grey = denormalize(pixels)[0] * 255 / 60
    # Away from borders, where bilinear pixels mix two classes, the pixel tells its label.
    assert ((grey[known] - target[known]).abs() < 0.2).float().mean() > 0.8
    assert (pixels[:, ~known] == 0).all()  # padding is the mean colour
    assert known.any(0).sum() * known.any(1).sum() == known.sum()  # and a rectangle is left


def test_resized_labels_lie_where_the_image_lies():
    # A vertical edge at an odd place: the half-way grey of the image must fall on the labels' border.
    labels = np.zeros((40, 40), dtype=np.int64)
    labels[:, 17:] = 1
    image = torch.from_numpy(labels * 200).to(torch.uint8).expand(3, -1, -1)
    for factor in (1.6, 2.0, 3.3):
        resize = RatioResize(40, (factor, factor))
        big, mask = resize(tv_tensors.Image(image), tv_tensors.Mask(torch.from_numpy(labels)))
        border = int((mask[0] == 1).nonzero()[0])
        assert abs(border - 17 * factor) <= 0.5
        assert big[0, 0, border] >= 100 - 45 and big[0, 0, border - 1] <= 100 + 45


def test_crops_avoid_one_class_where_they_can():
    labels = torch.zeros(200, 200, dtype=torch.int64)
    labels[:, 150:] = 1
    labels[:20] = 255
    crop = DiverseCrop((64, 64), 0.75, attempts=200)
    for _ in range(20):
        part = crop(tv_tensors.Mask(labels))
        counts = torch.bincount(part.flatten(), minlength=256)[:255]
        assert counts.max() < 0.75 * counts.sum()
    assert DiverseCrop((64, 64))(tv_tensors.Mask(torch.zeros(99, 70, dtype=torch.int64))).shape == (64, 64)
    assert DiverseCrop((64, 64))(tv_tensors.Mask(torch.full((50, 70), 255))).shape == (50, 64)


def test_distortion_changes_colours_within_bounds_and_never_swaps_channels():
    image = tv_tensors.Image(torch.tensor([200, 100, 50], dtype=torch.uint8)[:, None, None].expand(3, 8, 8))
    results = torch.stack([PhotometricDistortion()(image)[:, 0, 0].float() for _ in range(60)])
    assert len(results.unique(dim=0)) > 20
    assert (results[:, 0] >= results[:, 2] - 1).all()  # red stays above blue: no channel was swapped


def test_padding_only_fills_up():
    pad = PadTo((5, 4), {tv_tensors.Mask: 9})
    padded = pad(tv_tensors.Mask(torch.ones(3, 6, dtype=torch.int64)))
    assert padded.shape == (5, 6) and (padded[3:] == 9).all() and (padded[:3] == 1).all()


def test_mirroring_moves_both():
    image, labels = coded(blocks(64, 64, 20))
    transform = train_transform((64, 64), short_side=64, scale=(1, 1), hflip=1.0, distortion=False)
    pixels, target = transform(image, labels)
    assert torch.equal(target, torch.from_numpy(labels).flip(-1))
    assert torch.allclose(denormalize(pixels)[0] * 255, target.float() * 60, atol=0.51)


def test_evaluation_input_is_the_file():
    image, labels = coded(blocks(40, 50))
    pixels, target = as_tensors(image, labels)
    assert (target.numpy() == labels).all() and pixels.dtype == torch.uint8
    assert torch.allclose(denormalize(normalized(pixels))[1] * 255, target.float() * 60, atol=0.51)
