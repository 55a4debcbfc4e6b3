"""The numbers of an evaluation."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from sgformer.core.files import write_json


@dataclass(frozen=True)
class Evaluation:
    """The mean absolute error over so many images."""

    error: float
    images: int
    skipped: tuple[str, ...] = ()

    def headline(self):
        return f"error {self.error:.3f}"

    table = headline

    def counted(self):
        return f"{self.images} images"

    def write(self, folder, picture=True):
        Path(folder).mkdir(parents=True, exist_ok=True)
        write_json(Path(folder) / "metrics.json", asdict(self))


def read(folder):
    """What `write` left."""
    return Evaluation(**json.loads((Path(folder) / "metrics.json").read_text()))
