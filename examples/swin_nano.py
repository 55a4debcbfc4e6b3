"""A Swin of about the size of `sgformer_n`, which timm has none of. A plugin:

sgformer --plugin examples/swin_nano.py train classify --model swin_nano --data photos --image-size 64
"""

from timm.models import register_model
from timm.models.swin_transformer import SwinTransformer


@register_model
def swin_nano(pretrained: bool = False, pretrained_cfg=None, pretrained_cfg_overlay=None, **kwargs) -> SwinTransformer:
    """Widths 24 to 192, as sgformer_n's; windows of 7; any image size (1.7 M parameters, 0.31 GMACs at 224)."""
    kwargs.pop("cache_dir", None)  # timm says where pretrained weights are kept; there are none
    model = SwinTransformer(embed_dim=24, depths=(2, 2, 6, 2), num_heads=(1, 2, 4, 8), strict_img_size=False, **kwargs)
    model.pretrained_cfg = {"architecture": "swin_nano"}
    return model
