"""The heads have the published widths, work on any pyramid, and pass gradients to every parameter."""

import pytest
import torch
from torch import nn

from sgformer.heads.semantic_fpn import SemanticFPN
from sgformer.heads.upernet import UPerNet

STRIDES = (4, 8, 16, 32)


def maps(channels, height, width, batch=2):
    return [torch.randn(batch, c, -(-height // s), -(-width // s)) for c, s in zip(channels, STRIDES, strict=True)]


def convolutions(module):
    """(in, out, kernel) of every convolution."""
    convs = [m for m in module.modules() if isinstance(m, nn.Conv2d)]
    return sorted((c.in_channels, c.out_channels, c.kernel_size[0]) for c in convs)


def test_semantic_fpn_is_the_published_one():
    head = SemanticFPN((64, 128, 256, 512), STRIDES, 150)
    fpn = [(c, 256, 1) for c in (64, 128, 256, 512)] + [(256, 256, 3)] * 4
    # 1, 1, 2 and 3 convolutions bring strides 4, 8, 16 and 32 to 4.
    levels = [(256, 128, 3)] * 4 + [(128, 128, 3)] * 3
    assert convolutions(head) == sorted([*fpn, *levels, (128, 150, 1)])
    assert head.classifier.dropout.p == 0.1


def test_upernet_is_the_published_one():
    head = UPerNet((64, 128, 256, 512), STRIDES, 150)
    pooling = [(512, 512, 1)] * 4 + [(512 + 4 * 512, 512, 3)]
    pyramid = [(c, 512, 1) for c in (64, 128, 256)] + [(512, 512, 3)] * 3 + [(4 * 512, 512, 3)]
    auxiliary = [(256, 256, 3), (256, 150, 1)]
    assert convolutions(head) == sorted([*pooling, *pyramid, (512, 150, 1), *auxiliary])
    assert head.classifier.dropout.p == head.fcn[1].dropout.p == 0.1


@pytest.mark.parametrize("size", [(64, 64), (50, 70), (33, 97), (224, 32)])
@pytest.mark.parametrize("head", [SemanticFPN, UPerNet])
def test_any_size_and_every_gradient(head, size):
    channels = (8, 12, 16, 20)
    net = head(channels, STRIDES, 5, dim=8)
    features = [f.requires_grad_() for f in maps(channels, *size)]
    out = net(features)
    assert out.shape == (2, 5, -(-size[0] // 4), -(-size[1] // 4))
    loss = out.sum()
    if isinstance(net, UPerNet):
        aux = net.auxiliary(features)
        assert aux.shape == (2, 5, -(-size[0] // 16), -(-size[1] // 16))
        loss = loss + aux.sum()
    loss.backward()
    assert all(p.grad is not None for p in net.parameters()) and all(f.grad is not None for f in features)


def test_semantic_fpn_sums_its_levels():
    """Against the description written out slowly, for one image."""
    channels = (4, 6, 8, 10)
    net = SemanticFPN(channels, STRIDES, 3, dim=6).eval()
    features = maps(channels, 64, 96, 1)
    inner = [block[0](f) for block, f in zip(net.fpn.inner_blocks, features, strict=True)]
    for i in (2, 1, 0):
        inner[i] = inner[i] + inner[i + 1].repeat_interleave(2, -1).repeat_interleave(2, -2)
    total = 0
    for i, (x, block, convs) in enumerate(zip(inner, net.fpn.layer_blocks, net.levels, strict=True)):
        x = block[0](x)
        for conv in convs:
            x = conv.act(conv.norm(conv.conv(x)))
            if i:
                x = nn.functional.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
        total = total + x
    expected = net.classifier.conv(total)
    assert torch.allclose(net(features), expected, atol=1e-5)


def test_batches_do_not_mix_in_evaluation():
    for net in (SemanticFPN((4, 4, 4, 4), STRIDES, 3, 8).eval(), UPerNet((4, 4, 4, 4), STRIDES, 3, dim=8).eval()):
        features = maps((4, 4, 4, 4), 64, 64, 3)
        alone = torch.cat([net([f[i : i + 1] for f in features]) for i in range(3)])
        assert torch.allclose(net(features), alone, atol=1e-5)


def test_maps_come_finest_first():
    with pytest.raises(ValueError, match="finest first"):
        UPerNet((8, 4, 4, 4), (32, 16, 8, 4), 3)
