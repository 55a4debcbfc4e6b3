"""Asking networks for the page: what is taken in, one worker that everybody queues for, and what comes back."""

from __future__ import annotations

import asyncio
import dataclasses
import io
import secrets
import tempfile
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from PIL import Image

from sgformer.answers import find_images
from sgformer.data.image import read_image
from sgformer.explanations import Looker, load_looker, ranked_by
from sgformer.viz.segmentation import palette
from sgformer.viz.significance import Explanation, colour_map, draw_explanation, region_colours, region_names

#: What is taken in. Decoders without helper programs of their own; pixels as the header says, before decoding.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
MAX_BYTES = 20 * 2**20
MAX_PIXELS = 50_000_000
#: Larger images are reduced to this many pixels on the long side before a network sees them.
MAX_SIDE = 2048
#: Seconds that the bytes of an image may take to arrive, and that its turn and its answer may take.
ARRIVAL, PATIENCE = 30, 60
#: So many may wait for the worker; the next one is asked to try again.
QUEUE = 50
#: The latest looks can be fetched again; older ones while a page shows them.
KEPT = 24
EXAMPLES = 9

#: What tokens can be ranked by in place of what the network was trained with.
RANKINGS = ("coarse", "fine", "random", "uniform", "inverted", "feature-norm")

T = TypeVar("T")


class Busy(Exception):
    """Too many are waiting, or an answer took too long. The message is for the person who waits."""


def read_upload(data: bytes) -> Image.Image:
    """Bytes from anywhere as an RGB image of at most `MAX_SIDE` pixels a side.

    Raises:
        UserError: no image, broken, of another format than `FORMATS`, or more than `MAX_PIXELS` pixels.
    """
    image = read_image(data, "this file", formats=FORMATS, max_pixels=MAX_PIXELS)
    image.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.LANCZOS)
    return image


def png(pixels: np.ndarray) -> bytes:
    """(H, W, 3) uint8 as the bytes of a PNG."""
    out = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(out, "PNG")
    return out.getvalue()


@dataclasses.dataclass(frozen=True)
class Network:
    """A checkpoint, or the same with tokens ranked by something else than it was trained with."""

    name: str
    looker: Looker
    ranking: str | None = None

    def look(self, picture: Image.Image) -> Look:
        """One forward pass."""
        with ranked_by(self.looker.network, self.ranking):
            seen = self.looker.see(self.looker.read(picture))
        return Look(secrets.token_urlsafe(12), self, picture, seen)


@dataclasses.dataclass(frozen=True, eq=False)
class Look:
    """What a network saw of one image and said of it.

    Attributes:
        id: unguessable; its pictures are found under it.
        network: that was asked.
        picture: that it was asked about.
        seen: maps, regions, tokens and answer of the forward pass.
    """

    id: str
    network: Network
    picture: Image.Image
    seen: Explanation

    @property
    def task(self) -> str:
        """classify, segment or detect."""
        return str(self.network.looker.metadata.get("task", "classify"))

    def answer(self, most: int = 5) -> list[dict[str, Any]]:
        """What the network says, as JSON takes it: the most probable classes, objects, or classes by their area."""
        names = self.network.looker.names
        seen, said = self.seen, self.seen.answer
        if seen.logits is not None and not self.network.looker.network.num_classes:
            return []
        if seen.logits is not None:
            shares = np.exp(seen.logits - seen.logits.max())
            shares = shares / shares.sum()
            best = np.argsort(-shares, kind="stable")[:most]
            return [{"class": names[i] if names else str(i), "share": float(shares[i])} for i in best]
        count = max([len(names), *(int(i) + 1 for i in said["labels"].ravel())])
        names = names or [str(i) for i in range(count)]
        colours = ["#{:02x}{:02x}{:02x}".format(*rgb) for rgb in palette(names).tolist()]
        if "boxes" not in said:
            area = np.bincount(said["labels"].ravel(), minlength=len(names)) / said["labels"].size
            there = [i for i in np.argsort(-area, kind="stable") if area[i]]
            return [{"class": names[i], "share": float(area[i]), "colour": colours[i]} for i in there]
        return [
            {"class": names[i], "share": float(score), "colour": colours[i], "box": [round(v, 1) for v in box]}
            for i, score, box in zip(said["labels"], said["scores"], said["boxes"].tolist(), strict=True)
        ]

    def kinds(self) -> dict[str, str]:
        """The maps that can be laid over the image: name -> what the page calls it."""
        named = {"significance": "significance", "coarse": "coarse heads", "fine": "fine heads"}
        return named | ({"regions": "regions", "spent": "tokens spent"} if self.seen.tokens else {})

    def guided(self, block: str) -> str | None:
        """The self-guided block that sorts by a hybrid-scale block's map, if there is one."""
        stage, number = block.split(".")
        after = f"{stage}.{int(number) + 1}"
        return after if after in self.seen.tokens else None

    def map(self, kind: str, block: str) -> bytes:
        """A map as a PNG of one pixel per token.

        Raises:
            KeyError: there is no such map.
        """
        if kind not in self.kinds() or block not in self.seen.significance:
            raise KeyError(f"{kind}/{block}")
        if kind in ("significance", "coarse", "fine"):
            return png(colour_map(getattr(self.seen, kind)[block]))
        guided = self.guided(block)
        if guided is None:
            raise KeyError(f"{kind}/{block}")
        if kind == "spent":
            return png(colour_map(np.log(self.seen.density(guided)), "magma"))
        colours = np.array([_rgb(c) for c in region_colours(len(self.seen.rates[guided]))], np.uint8)
        return png(colours[self.seen.regions[guided]])

    def tokens(self, block: str) -> dict[str, Any] | None:
        """Which places share a key/value token, as the viewer wants it; None where nothing is reallocated."""
        guided = self.guided(block)
        if guided is None:
            return None
        tokens, rates = self.seen.tokens[guided], self.seen.rates[guided]
        return {
            "height": tokens.shape[0],
            "width": tokens.shape[1],
            "tokens": tokens.ravel().tolist(),
            "regions": self.seen.regions[guided].ravel().tolist(),
            "count": int(tokens.max()) + 1,
            "names": region_names(len(rates)),
            "colours": [_rgb(c) for c in region_colours(len(rates))],
        }

    def sheet(self) -> bytes:
        """The sheet of `sgformer explain`, as a PNG."""
        lines = [self.network.name, self.seen.title]
        titled = dataclasses.replace(self.seen, title="\n".join(filter(None, lines)))
        with tempfile.TemporaryDirectory(prefix="sgformer-") as folder:
            draw_explanation(titled, Path(folder) / "sheet.png")
            return (Path(folder) / "sheet.png").read_bytes()


def _rgb(colour: str) -> tuple[int, int, int]:
    red, green, blue = bytes.fromhex(colour.removeprefix("#"))
    return red, green, blue


class Desk:
    """Networks and the one worker that asks them; all methods but `ask` and `look` are quick.

    Args:
        weights: one or two run folders or weights files.
        examples: a folder of images to choose from; by default validation images of the first run.
        device: "auto", "cpu", "cuda" ...

    Raises:
        UserError: weights or examples do not do.
    """

    def __init__(self, weights: Sequence[str], examples: str | None = None, device: str = "auto"):
        self.networks: dict[str, Network] = {}
        for path in weights:
            name = self._name(Path(path))
            looker = load_looker(path, device)
            self.networks[name] = Network(name, looker)
            config = looker.network.config
            for ranking in RANKINGS if config.pairs == "guided" else ():
                if ranking != config.significance:
                    longer = f"{name}, ranked by {ranking}"
                    self.networks[longer] = Network(longer, looker, ranking)
        self.checkpoints = [name for name, network in self.networks.items() if network.ranking is None]
        self.examples = [read_upload(_bytes(image)) for image in _examples(weights[0], examples)]
        self.waiting = 0
        self._worker = ThreadPoolExecutor(1, "sgformer-look")
        self._recent: deque[Look] = deque(maxlen=KEPT)
        self._shown: weakref.WeakValueDictionary[str, Look] = weakref.WeakValueDictionary()

    def _name(self, path: Path) -> str:
        name = path.name if path.is_dir() else path.stem
        name = name or path.resolve().name
        if name in self.networks:
            name = f"{path.resolve().parent.name}/{name}"
        return name if name not in self.networks else f"{name} (2)"

    def find(self, id: str) -> Look:
        """KeyError where it is gone."""
        return self._shown[id]

    async def look(self, picture: Image.Image | bytes, network: str | None = None) -> Look:
        """Wait for one's turn, and let a network look at an image; by default the first network.

        Raises:
            UserError: the bytes do not do.
            KeyError: no such network.
            Busy: the queue is full, or it took too long.
        """
        asked = self.networks[network or self.checkpoints[0]]
        look = await self.ask(lambda: asked.look(read_upload(picture) if isinstance(picture, bytes) else picture))
        self._recent.append(look)
        self._shown[look.id] = look
        return look

    async def ask(self, work: Callable[[], T]) -> T:
        """Have something done by the worker, first come, first served.

        Raises:
            Busy: the queue is full, or it took too long.
        """
        if self.waiting >= QUEUE:
            raise Busy("Too many people are waiting at the moment. Please try again in a minute.")
        self.waiting += 1
        try:
            return await asyncio.wait_for(asyncio.wrap_future(self._worker.submit(work)), PATIENCE)
        except (TimeoutError, asyncio.TimeoutError):
            raise Busy(f"This took longer than {PATIENCE} seconds. Please try again.") from None
        finally:
            self.waiting -= 1


def _bytes(image: Path | Image.Image) -> bytes:
    assert isinstance(image, Path)
    return image.read_bytes()


def _examples(weights: str, folder: str | None) -> list[Path | Image.Image]:
    """Images spread over a folder, over the validation images of a run, or those that packages bring along."""
    places = [Path(folder)] if folder else []
    if not folder and (Path(weights) / "config.yaml").is_file():
        import yaml

        data = Path(str((yaml.safe_load((Path(weights) / "config.yaml").read_text()) or {}).get("data")))
        places = [p for p in (data / "val", data / "val2017", data / "images" / "validation") if p.is_dir()]
    if not places:
        import matplotlib

        places = [Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"]
    found = list(find_images(places[:1]))
    return [found[i * len(found) // EXAMPLES] for i in range(EXAMPLES)] if len(found) > EXAMPLES else found
