"""What people do to a network once it is built; each changes what a small one of three stages computes."""

import torch
import torch.nn as nn
from torch.nn.utils.parametrize import register_parametrization

from sgformer import ops
from sgformer.models.significance import LearnedSignificance


class Adapted(nn.Linear):
    def forward(self, x):
        return super().forward(x).flip(-1)


class Turned(nn.Module):
    """The other way round along the width; a factor or a sum would be lost in the norm that follows."""

    def forward(self, x):
        return x.flip(2)


class Backwards(nn.Module):
    def forward(self, weight):
        return weight.flip(0)


def block(model, stage, number):
    return model.stages[stage].blocks[number]


def twice(function):
    """A result that rounding cannot hide."""
    return lambda *args, **options: 2 * function(*args, **options)


def circular(conv):
    conv.padding_mode, conv._reversed_padding_repeated_twice = "circular", [1, 1, 1, 1]


CHANGES = {
    "adapter": lambda m: setattr(block(m, 1, 1).attn.proj_in, "__class__", Adapted),
    "adapter in an MLP": lambda m: setattr(block(m, 0, 0).mlp.fc2, "__class__", Adapted),
    "adapter at the end": lambda m: setattr(m.get_classifier(), "__class__", Adapted),
    "parametrised": lambda m: register_parametrization(block(m, 0, 0).mlp.fc1, "weight", Backwards()),
    "hook": lambda m: block(m, 0, 1).attn.kv.register_forward_hook(lambda module, args, out: 2 * out),
    "hook on a block": lambda m: block(m, 0, 0).register_forward_pre_hook(lambda module, args: (2 * args[0],)),
    "hook on a norm": lambda m: m.stages[0].norm.register_forward_hook(lambda module, args, out: out.flip(-1)),
    "forward": lambda m: setattr(block(m, 0, 0).attn, "forward", lambda x: (x * 0, *x.new_zeros(2, *x.shape[:3]))),
    "norm left out": lambda m: setattr(block(m, 1, 0), "norm1", nn.Identity()),
    "no MLP": lambda m: setattr(block(m, 1, 0), "mlp", nn.Identity()),
    "other MLP": lambda m: setattr(block(m, 0, 1), "mlp", nn.Linear(32, 32)),
    "turned": lambda m: setattr(block(m, 0, 0), "drop_path", Turned()),
    "last norm left out": lambda m: setattr(m.stages[1], "norm", nn.Identity()),
    "strides": lambda m: setattr(m.stages[1].downsample.reduce.conv, "stride", (1, 1)),
    "dilation": lambda m: [setattr(block(m, 0, 1).attn.local, k, (2, 2)) for k in ("dilation", "padding")],
    "no convolution in an MLP": lambda m: setattr(block(m, 0, 1).mlp, "conv", nn.Identity()),
    "padding": lambda m: circular(m.stem.conv2.conv),
    "a bias": lambda m: m.stem.conv2.conv.register_parameter("bias", nn.Parameter(torch.arange(32.0))),
    "groups": lambda m: setattr(m.stem.conv1.norm, "num_groups", 8),
    "tanh": lambda m: setattr(m.stem.conv1, "act", nn.GELU(approximate="tanh")),
    "another layer": lambda m: m.stem.conv1.append(Turned()),
    "source": lambda m: setattr(block(m, 0, 1), "source", LearnedSignificance(32)),
    "attend": lambda m: setattr(block(m, 0, 1).attn, "attend", twice(ops.attend_linearly)),
}
