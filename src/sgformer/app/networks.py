"""Networks as the page's worker holds them: what is taken in, and what they are asked."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from sgformer.data.image import read_image
from sgformer.explaining.base import Explainer, ranked_by
from sgformer.results import Explanation
from sgformer.tasks.api import load_explainer
from sgformer.viz.significance import draw_explanation

#: What is taken in. Decoders without helper programs of their own; pixels as the header says, before decoding.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
MAX_PIXELS = 50_000_000
#: Larger images are reduced to this many pixels on the long side before a network sees them.
MAX_SIDE = 2048

#: What tokens can be ranked by in place of what the network was trained with.
RANKINGS = ("coarse", "fine", "random", "uniform", "inverted", "feature-norm")


def read_upload(data: bytes) -> Image.Image:
    """Bytes from anywhere as an RGB image of at most `MAX_SIDE` pixels a side.

    Raises:
        UserError: no image, broken, of another format than `FORMATS`, or more than `MAX_PIXELS` pixels.
    """
    return reduced(read_image(data, "this file", formats=FORMATS, max_pixels=MAX_PIXELS))


def reduced(image: Image.Image) -> Image.Image:
    image.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.LANCZOS)
    return image


@dataclasses.dataclass(frozen=True)
class Network:
    """A checkpoint, or the same with tokens ranked by something else than it was trained with.

    Attributes:
        name: on the page.
        ranking: what its tokens are ranked by; None: as trained.
        task: classify, segment or detect.
        model: its size or timm's name.
        classes: their names, as far as known.
        parameters: how many it has.
        answers: whether it says anything of an image: a bare backbone does not.
        score: of a detector: what is less certain is left out.
    """

    name: str
    ranking: str | None
    task: str
    model: str
    classes: tuple[str, ...]
    parameters: int
    answers: bool
    score: float


class Networks:
    """One or two checkpoints, ready to explain images.

    Args:
        weights: run folders or weights files.
        device: "auto", "cpu", "cuda" ...

    Raises:
        UserError: weights or device do not do.
    """

    def __init__(self, weights: Sequence[str], device: str = "auto"):
        self.loaded: dict[str, tuple[Explainer, str | None]] = {}
        for path in weights:
            name, explainer = self._name(Path(path)), load_explainer(path, device)
            self.loaded[name] = explainer, None
            config = explainer.network.config
            for ranking in RANKINGS if config.pairs == "guided" else ():
                if ranking != config.significance:
                    self.loaded[f"{name}, ranked by {ranking}"] = explainer, ranking

    def about(self) -> list[Network]:
        """What there is, each checkpoint before its other rankings."""
        return [
            Network(
                name=name,
                ranking=ranking,
                task=str(explainer.metadata.get("task", "classify")),
                model=str(explainer.metadata.get("model", "sgformer")),
                classes=tuple(explainer.names),
                parameters=sum(p.numel() for p in explainer.model.parameters()),
                answers=bool(getattr(explainer.model, "num_classes", 0)),
                score=explainer.score,
            )
            for name, (explainer, ranking) in self.loaded.items()
        ]

    def explain(self, name: str, picture: Image.Image | bytes) -> tuple[Image.Image, Explanation]:
        """One forward pass.

        Args:
            name: of the network.
            picture: the image, or its bytes as they came.

        Returns:
            The image, and what was seen and said of it.

        Raises:
            UserError: the bytes do not do.
        """
        explainer, ranking = self.loaded[name]
        image = read_upload(picture) if isinstance(picture, bytes) else picture
        with ranked_by(explainer.network, ranking):
            return image, explainer.explain(explainer.read(image))

    def sheet(self, seen: Explanation) -> bytes:
        """The sheet of `sgformer explain`, as a PNG."""
        with tempfile.TemporaryDirectory(prefix="sgformer-") as folder:
            draw_explanation(seen, Path(folder) / "sheet.png")
            return (Path(folder) / "sheet.png").read_bytes()

    def _name(self, path: Path) -> str:
        name = path.name if path.is_dir() else path.stem
        name = name or path.resolve().name
        if name in self.loaded:
            name = f"{path.resolve().parent.name}/{name}"
        return name if name not in self.loaded else f"{name} (2)"
