"""Make the package's weights of a size from a run on Tiny ImageNet: half precision, names for classes, terms.

    python benchmarks/package_weights.py RUN NAMES.tsv [IMAGE_SIZE]

NAMES.tsv has a line of WordNet id, tab, synonyms for each class, as words.txt of ImageNet. The first synonym becomes
the class's name. IMAGE_SIZE is what others' images are resized to; by default as trained.
"""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

from sgformer.models import checkpoint
from sgformer.models.load import read_weights
from sgformer.models.pretrained import pretrained_file

TERMS = "trained on photographs of Tiny ImageNet, whose terms are ImageNet's: non-commercial research (image-net.org)"


def main(run: str, names: str, image_size: str | None = None) -> Path:
    """Returns the file written, at its place in this checkout."""
    weights = read_weights(run)
    assert weights.config is not None
    with open(names, encoding="utf-8") as file:
        first = {
            row[0]: row[1].split(",")[0].strip() for row in csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        }
    classes = [first[wordnet_id] for wordnet_id in weights.metadata["classes"]]
    assert len(set(classes)) == len(classes), "two classes share their first synonym"
    path = pretrained_file(str(weights.model))
    assert path is not None, f"the package has no weights of {weights.model}"
    about = {**weights.metadata, "classes": classes, "wordnet": weights.metadata["classes"], "terms": TERMS}
    if image_size is not None:
        about["image_size"] = int(image_size)
    tensors = {name: tensor.half() for name, tensor in weights.tensors.items()}
    path.parent.mkdir(exist_ok=True)
    return checkpoint.write_safetensors(
        tensors,
        path,
        {
            "format": checkpoint.FORMAT,
            "config": json.dumps(weights.config.to_dict()),
            "metadata": json.dumps(about),
            "license": TERMS,
        },
    )


if __name__ == "__main__":
    print(main(*sys.argv[1:]))
