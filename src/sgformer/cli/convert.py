"""`sgformer convert`."""

from __future__ import annotations

from sgformer.core.files import try_file
from sgformer.core.terminal import say


def convert(source: str, target: str, raw: bool = False) -> int:
    """Convert a released SG-Former checkpoint to a .safetensors file of weights and config.

    Nothing in the released file is executed.

    Args:
        source: a released .pth file
        target: the .safetensors file to write
        raw: convert the raw weights instead of the averaged (EMA) ones
    """
    from sgformer.models.released import convert as convert_released

    try_file(target, option=None)
    convert_released(source, target, raw=raw)
    say(f"wrote {target}")
    return 0
