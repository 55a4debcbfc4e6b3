"""`sgformer convert`."""

from __future__ import annotations


def convert(source: str, target: str, raw: bool = False) -> int:
    """Turn a released SG-Former checkpoint into a .safetensors file that holds weights and config.

    Nothing in the released file is executed.

    Args:
        source: a released .pth file
        target: the .safetensors file to write
        raw: take the raw weights instead of the averaged (EMA) ones
    """
    from sgformer.models.released import convert as convert_released

    convert_released(source, target, raw=raw)
    print(f"wrote {target}")
    return 0
