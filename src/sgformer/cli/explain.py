"""`sgformer explain`."""

from __future__ import annotations

from pathlib import Path

from sgformer.core.errors import UserError, require


def explain(
    weights: str,
    images: list[str],
    out: str = "explained",
    limit: int | None = None,
    arrays: bool = False,
    image_size: int | tuple[int, int] | None = None,
    model: str | None = None,
    device: str = "auto",
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
        device: auto, cpu, cuda, cuda:1, mps
    """
    if limit is not None and limit < 1:
        raise UserError(f"--limit must be above 0, got {limit}")
    require("matplotlib", extra="train")

    from sgformer.tasks.api import explain
    from sgformer.viz.significance import draw_explanation, write_index

    entries = []
    for number, explanation in enumerate(
        explain(weights, images, image_size=image_size, limit=limit, device=device, model=model)
    ):
        folder = Path(out)
        folder.mkdir(parents=True, exist_ok=True)
        name = f"{number:04d}.png"
        draw_explanation(explanation, folder / name)
        if arrays:
            explanation.save_arrays(folder / f"{number:04d}.npz")
        entries.append((" ".join(explanation.title.split("\n")), name))
        print(f"{folder / name}  {entries[-1][0]}")
    page = write_index(out, entries, f"What {Path(weights).name or weights} attended to")
    print(f"index: {page}")
    return 0
