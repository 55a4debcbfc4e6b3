"""`sgformer explain`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from sgformer.cli.images import exit_status, open_images
from sgformer.core.errors import UserError, require
from sgformer.core.files import make_folder, try_folder
from sgformer.core.terminal import say


def explain(
    weights: str,
    images: list[str],
    out: str = "explained",
    limit: int | None = None,
    arrays: bool = False,
    image_size: int | tuple[int, int] | None = None,
    model: str | None = None,
    tokens: float | None = None,
    device: str = "auto",
    bad_images: Literal["skip", "stop"] = "skip",
) -> int:
    """Show what a trained network attended to: a sheet per image and a page of all sheets.

    Args:
        weights: a run folder, .safetensors, a released or timm checkpoint, sgformer_n
        images: image files, or folders of them
        out: folder for the sheets and index.html
        limit: maximum number of images, spread evenly over those given
        arrays: also write everything drawn as .npz
        image_size: pixels; by default as trained
        model: network name, if the weights are a plain state dict
        tokens: key/value tokens, as a multiple of those trained with: .25 to 4
        device: auto, cpu, cuda, cuda:1, mps
        bad_images: on an unreadable image: skip it, name it and exit with 1; or stop
    """
    if limit is not None and limit < 1:
        raise UserError(f"--limit must be above 0, got {limit}")
    require("matplotlib", extra="train")

    from sgformer.explaining.base import open_picture
    from sgformer.tasks.api import explain_images
    from sgformer.viz.significance import draw_explanation, write_index

    opened = open_images(images, bad_images, open=open_picture).limited(limit)
    explanations = explain_images(weights, opened, image_size, device, model, tokens)
    try_folder(out)
    folder, entries = Path(out), []
    for number, explanation in enumerate(explanations):
        make_folder(folder)
        name = f"{number:04d}.png"
        draw_explanation(explanation, folder / name)
        if arrays:
            explanation.save_arrays(folder / f"{number:04d}.npz")
        entries.append((" ".join(explanation.title.split("\n")), name))
        say(f"{folder / name}  {entries[-1][0]}")
    status = exit_status(opened, len(entries))
    page = write_index(out, entries, f"What {Path(weights).name or weights} attended to")
    say(f"index: {page}")
    return status
