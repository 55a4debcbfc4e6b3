"""The smallest head there is: a 1 x 1 convolution on every map, resized and summed. A plugin:

sgformer --plugin examples/linear_head.py train segment --head linear --data photos
"""

from torch import nn

import sgformer
from sgformer.heads.common import ConvNormAct, PixelClassifier, resize


@sgformer.register_head("linear")
class LinearHead(nn.Module):
    """Four maps (B, C_i, H_i, W_i), finest first -> class logits (B, num_classes, H_0, W_0)."""

    def __init__(self, channels, strides, num_classes, dim=64):
        super().__init__()
        self.lateral = nn.ModuleList(ConvNormAct(c, dim, 1) for c in channels)
        self.classifier = PixelClassifier(dim, num_classes, dropout=0.1)

    def forward(self, features):
        first, *rest = (conv(x) for conv, x in zip(self.lateral, features, strict=True))
        return self.classifier(first + sum(resize(x, first) for x in rest))
