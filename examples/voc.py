"""Object detection on the layout of PASCAL VOC. A plugin:

sgformer --plugin examples/voc.py train detect --data VOCdevkit/VOC2012

    Annotations/NAME.xml    JPEGImages/*    ImageSets/Main/train.txt, val.txt: a NAME a line
"""

from pathlib import Path
from xml.etree import ElementTree

import sgformer
from sgformer.data.coco import make_listing


def detects(root):
    """Whether there are lists of images beside annotations."""
    return (Path(root) / "ImageSets" / "Main").is_dir() and (Path(root) / "Annotations").is_dir()


def open_voc(root, split, classes=None, images=None, **options):
    """A split in COCO's words; `difficult` objects become crowd regions, on which detections cost nothing."""
    root, content = Path(root), {"images": [], "annotations": []}
    try:
        for number, name in enumerate((root / "ImageSets" / "Main" / f"{split}.txt").read_text().split()):
            about = ElementTree.parse(root / "Annotations" / f"{name}.xml").getroot()
            width, height = (int(about.findtext(f"size/{side}")) for side in ("width", "height"))
            file = about.findtext("filename")
            content["images"].append({"id": number, "file_name": file, "width": width, "height": height})
            for thing in about.iter("object"):
                left, top, right, bottom = (
                    float(thing.findtext(f"bndbox/{side}")) for side in ("xmin", "ymin", "xmax", "ymax")
                )
                content["annotations"].append(
                    {
                        "image_id": number,
                        "category_id": thing.findtext("name"),
                        "bbox": [left - 1, top - 1, right - left + 1, bottom - top + 1],  # pixels count from 1
                        "iscrowd": int(thing.findtext("difficult", "0")),
                    }
                )
    except (OSError, ElementTree.ParseError, TypeError, ValueError) as error:
        raise sgformer.UserError(f"{root}: {split} cannot be read as PASCAL VOC: {error}") from None
    ids = {name: i for i, name in enumerate(sorted({a["category_id"] for a in content["annotations"]}), 1)}
    for annotation in content["annotations"]:
        annotation["category_id"] = ids[annotation["category_id"]]
    content["categories"] = [{"id": i, "name": name} for name, i in ids.items()]
    return make_listing(content, root, images or root / "JPEGImages", categories=classes, **options)


sgformer.register_format("voc", "objects", detects, open_voc)
