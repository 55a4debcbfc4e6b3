"""What a folder in the wrong layout looks like, and what to do about it; a clause for error messages."""

from __future__ import annotations

import os
from pathlib import Path

from sgformer.data import sources
from sgformer.data.coco import is_coco
from sgformer.data.image import IMAGE_EXTENSIONS, walk
from sgformer.data.sources.base import SPLIT_WORDS

#: Format of other tools -> layouts that it usually has enough for, the likeliest first.
CONVERTS = {
    "coco": ("ade20k",),
    "predictions": ("imagenet",),
    "voc": ("coco",),
    "yolo": ("coco", "ade20k"),
    "labelme": ("coco", "ade20k", "imagenet"),
    "via": ("coco", "ade20k"),
    "csv": ("imagenet", "coco"),
    "openimages": ("coco", "imagenet"),
    "colours": ("ade20k",),
}
OWN = {
    "coco": "COCO annotations, which `sgformer train detect` reads",
    "ade20k": "the ADE20K layout, which `sgformer train segment` reads",
    "imagenet": "folders of classes, which `sgformer train classify` reads",
}
SPLIT = "there are no validation images: --val-split .2 keeps a fifth of the images for that"


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
            return SPLIT if layout != "coco" and unsplit(path, layout) else ""
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


def unsplit(root: Path, layout: str) -> str | None:
    """The folder that holds all images of an image folder or of label maps without validation images: "train" or
    "training", or "." for images that are not in a split's folder; None if there are validation images."""
    folder, name = (root, "train") if layout == "imagenet" else (root / "images", "training")
    if not folder.is_dir() or validation_folder(root, layout) is not None:
        return None
    if (folder / name).is_dir():
        return name
    return "." if layout == "ade20k" or class_folders(root) else None


def validation_folder(root: Path, layout: str) -> Path | None:
    """The folder of an image folder's or label maps' validation images or, beside one of training images, the one that
    is probably meant to be it; None if there is none."""
    folder, train, val = (root, "train", "val") if layout == "imagenet" else (root / "images", "training", "validation")
    if (folder / val).is_dir() or not (folder / train).is_dir():
        return folder / val if (folder / val).is_dir() else None
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_dir())
    return next((folder / name for word in SPLIT_WORDS["val"] for name in names if name.lower() == word), None)
