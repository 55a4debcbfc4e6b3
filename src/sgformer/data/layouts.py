"""What a folder in the wrong layout looks like, and what to do about it; a clause for error messages."""

from __future__ import annotations

import os
from pathlib import Path

from sgformer.data import sources
from sgformer.data.coco import is_coco
from sgformer.data.image import IMAGE_EXTENSIONS, walk

#: Format of other tools -> layouts that it usually has enough for, the likeliest first.
CONVERTS = {
    "coco": ("ade20k",),
    "predictions": ("imagenet",),
    "voc": ("coco",),
    "yolo": ("coco", "ade20k"),
    "labelme": ("coco", "ade20k", "imagenet"),
    "csv": ("imagenet", "coco"),
    "openimages": ("coco", "imagenet"),
    "colours": ("ade20k",),
}
OWN = {
    "coco": "COCO annotations, which `sgformer train detect` reads",
    "ade20k": "the ADE20K layout, which `sgformer train segment` reads",
    "imagenet": "folders of classes, which `sgformer train classify` reads",
}
SPLIT = "it is not split: --val-split .2 keeps a fifth of the images for validation"


def hint(root: str | os.PathLike[str], layout: str) -> str:
    """What a data set that is not as a layout should be looks like, and the command that helps; "" if nothing does.

    Args:
        root: the data set.
        layout: the layout that was expected: "coco", "ade20k" or "imagenet".
    """
    path = Path(root)
    if not path.exists():
        return ""
    try:
        own = own_layout(path)
        if own == layout:
            return SPLIT if is_single(path, layout) else ""
        found = sources.recognize(path)
    except OSError:  # a folder that may not be listed
        return ""
    if found and layout in CONVERTS[found]:
        return f"it looks like {sources.FORMATS[found]}: `{command(root, layout)}` converts it"
    if own:
        return f"it looks like {OWN[own]}"
    if found:
        other = CONVERTS[found][0]
        return (
            f"it looks like {sources.FORMATS[found]}, which `{command(root, other)}` converts, but not to this layout"
        )
    return ""


def command(root: str | os.PathLike[str], layout: str) -> str:
    """The command that converts a data set."""
    return f"sgformer data from {root} OUT --layout {layout}"


def own_layout(root: Path) -> str | None:
    """The layout that a folder seems to be in, split or not."""
    if root.is_file() or (is_coco(root) and sources.recognize(root) == "coco"):
        return "coco" if sources.recognize(root) == "coco" else None
    if (root / "images").is_dir() and (root / "annotations").is_dir():
        if next(walk(root / "annotations", (".png",)), None) and sources.recognize(root) is None:
            return "ade20k"
        return None
    if sources.recognize(root) is None and (class_folders(root / "train") or class_folders(root)):
        return "imagenet"
    return None


def class_folders(root: Path) -> list[str]:
    """Names of the folders directly in `root` that hold images; empty if fewer than two do."""
    if not root.is_dir():
        return []
    folders = [entry for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith(".")]
    names = [entry.name for entry in folders if any(f.suffix.lower() in IMAGE_EXTENSIONS for f in entry.iterdir())]
    return sorted(names) if len(names) > 1 else []


def is_single(root: Path, layout: str) -> bool:
    """Whether an image folder or label maps have no validation split; `find_coco` says so itself."""
    folder = {"imagenet": root / "val", "ade20k": root / "images" / "validation"}.get(layout)
    return folder is not None and not folder.is_dir()
