"""The networks inside the page's worker: accepted uploads, and the methods the page calls."""

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

#: Accepted formats, whose decoders run no external programs, and the pixel limit, checked in the header.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
MAX_PIXELS = 50_000_000
#: Larger images are reduced to this many pixels on the long side before inference.
MAX_SIDE = 2048

#: Sources of significance that can replace the one a network was trained with.
RANKINGS = ("coarse", "fine", "random", "uniform", "inverted", "feature-norm")


def read_upload(data: bytes) -> Image.Image:
    """Decode untrusted bytes as an RGB image of at most `MAX_SIDE` pixels per side.

    Raises:
        UserError: not an image, damaged, not one of `FORMATS`, or more than `MAX_PIXELS` pixels.
    """
    return reduced(read_image(data, "this file", formats=FORMATS, max_pixels=MAX_PIXELS))


def reduced(image: Image.Image) -> Image.Image:
    image.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.LANCZOS)
    return image


@dataclasses.dataclass(frozen=True)
class Network:
    """A checkpoint, or the same checkpoint with tokens ranked by another source.

    Attributes:
        name: shown on the page.
        ranking: the source of significance that ranks tokens; None: as trained.
        task: classify, segment or detect.
        model: the size or timm's name.
        classes: class names, as far as known.
        parameters: number of parameters.
        predicts: whether it has a head; a bare backbone predicts nothing.
        score: minimum score of the objects shown; detectors only.
        guided: whether it makes key/value tokens, whose number can be set.
    """

    name: str
    ranking: str | None
    task: str
    model: str
    classes: tuple[str, ...]
    parameters: int
    predicts: bool
    score: float
    guided: bool = True


class Networks:
    """One or two checkpoints, ready to explain images.

    Args:
        weights: run folders or weights files.
        device: "auto", "cpu", "cuda" ...

    Raises:
        UserError: the weights or the device are invalid.
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

    def describe(self) -> list[Network]:
        """All networks; each checkpoint comes before its variants with other rankings."""
        return [
            Network(
                name=name,
                ranking=ranking,
                task=str(explainer.metadata.get("task", "classify")),
                model=str(explainer.metadata.get("model", "sgformer")),
                classes=tuple(explainer.names),
                parameters=sum(p.numel() for p in explainer.model.parameters()),
                predicts=bool(getattr(explainer.model, "num_classes", 0)),
                score=explainer.score,
                guided=explainer.network.config.pairs == "guided",
            )
            for name, (explainer, ranking) in self.loaded.items()
        ]

    def explain(self, name: str, picture: Image.Image | bytes, tokens: float = 1.0) -> tuple[Image.Image, Explanation]:
        """Run one forward pass.

        Args:
            name: the network's name.
            picture: the image, or the bytes of an upload.
            tokens: the token budget; of a network without tokens, 1.

        Returns:
            The image and its explanation.

        Raises:
            UserError: the bytes are not an accepted image.
        """
        explainer, ranking = self.loaded[name]
        image = read_upload(picture) if isinstance(picture, bytes) else picture
        if tokens != explainer.network.token_budget:
            explainer.network.set_token_budget(tokens)
        with ranked_by(explainer.network, ranking):
            return image, explainer.explain(explainer.read(image))

    def sheet(self, explanation: Explanation) -> bytes:
        """The sheet of `sgformer explain`, as a PNG."""
        with tempfile.TemporaryDirectory(prefix="sgformer-") as folder:
            draw_explanation(explanation, Path(folder) / "sheet.png")
            return (Path(folder) / "sheet.png").read_bytes()

    def _name(self, path: Path) -> str:
        name = path.name if path.is_dir() else path.stem
        name = name or path.resolve().name
        if name in self.loaded:
            name = f"{path.resolve().parent.name}/{name}"
        return name if name not in self.loaded else f"{name} (2)"
