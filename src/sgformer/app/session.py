"""The page's session: who may ask networks, for how long one waits, and what comes back."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import io
import secrets
import weakref
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from sgformer.app.networks import Network, Networks, reduced
from sgformer.app.worker import Worker
from sgformer.core.errors import UserError, require
from sgformer.data.image import find_images, read_image
from sgformer.results import Explanation
from sgformer.tasks.registry import get_task
from sgformer.viz.significance import colour_map, region_colours, region_names

#: Bytes of an image, and seconds that they may take to arrive.
MAX_BYTES, ARRIVAL = 20 * 2**20, 30
#: Seconds that a network may work on an image before it is stopped, and that turn and answer may take together.
WORK, PATIENCE = 60, 150
#: So many may wait for the worker; the next one is asked to try again.
QUEUE = 50
#: The latest results can be fetched again; older ones while a page shows them.
KEPT = 24
EXAMPLES = 9


class Busy(Exception):
    """Too many are waiting, or for too long. The message is for the person who waits."""


def png(pixels: np.ndarray) -> bytes:
    """(H, W, 3) uint8 as the bytes of a PNG."""
    out = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(out, "PNG")
    return out.getvalue()


@dataclasses.dataclass(frozen=True, eq=False)
class Result:
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

    def answer(self) -> list[dict[str, Any]]:
        """What the network found, as JSON takes it; see `Task.summary`."""
        if not self.network.answers:
            return []
        return get_task(self.network.task).summary(self.seen, self.network.classes)

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


def _rgb(colour: str) -> tuple[int, int, int]:
    red, green, blue = bytes.fromhex(colour.removeprefix("#"))
    return red, green, blue


class Session:
    """Networks in a worker that everybody queues for; all methods but `explain` and `sheet` are quick.

    Args:
        worker: holds a `Networks`; `load` makes both.
        examples: images to choose from.
    """

    def __init__(self, worker: Any, examples: Sequence[Image.Image] = ()):
        self.networks: dict[str, Network] = {network.name: network for network in worker.ask("about")}
        self.checkpoints = [name for name, network in self.networks.items() if network.ranking is None]
        self.examples = list(examples)
        self.waiting = 0
        self._worker = worker
        self._turns = ThreadPoolExecutor(1, "sgformer-turn")
        self._recent: deque[Result] = deque(maxlen=KEPT)
        self._shown: weakref.WeakValueDictionary[str, Result] = weakref.WeakValueDictionary()

    @classmethod
    def load(cls, weights: Sequence[str], examples: str | None = None, device: str = "auto") -> Session:
        """A session with a worker of its own, to be closed at the end.

        Args:
            weights: one or two run folders or weights files.
            examples: a folder of images to choose from; by default validation images of the first run.
            device: "auto", "cpu", "cuda" ...

        Raises:
            UserError: weights, examples or device do not do.
        """
        pictures = [reduced(read_image(path)) for path in _examples(Path(weights[0]), examples)]
        return cls(Worker(Networks, list(weights), device), pictures)

    def close(self) -> None:
        """End the worker, whatever it is doing."""
        self._worker.close()
        self._turns.shutdown(cancel_futures=True)

    def find(self, id: str) -> Result:
        """KeyError where it is gone."""
        return self._shown[id]

    async def explain(self, picture: Image.Image | bytes, network: str | None = None) -> Result:
        """Wait for one's turn, and let a network look at an image; by default the first network.

        Raises:
            UserError: the bytes do not do.
            KeyError: no such network.
            Busy, Stopped: as of `_ask`.
        """
        asked = self.networks[network or self.checkpoints[0]]
        image, seen = await self._ask("explain", asked.name, picture)
        result = Result(secrets.token_urlsafe(12), asked, image, seen)
        self._recent.append(result)
        self._shown[result.id] = result
        return result

    async def sheet(self, result: Result) -> bytes:
        """The sheet of `sgformer explain` of a result, as a PNG; waits and raises as `explain` does."""
        lines = filter(None, [result.network.name, result.seen.title])
        return await self._ask("sheet", dataclasses.replace(result.seen, title="\n".join(lines)))

    async def _ask(self, method: str, *args: Any) -> Any:
        """Have something done by the worker, first come, first served.

        Raises:
            Busy: the queue is full, or turn and answer did not come in time.
            Stopped: the worker was at it for too long, or died of it.
        """
        if self.waiting >= QUEUE:
            raise Busy("Too many people are waiting at the moment. Please try again in a minute.")
        self.waiting += 1
        try:
            # Who gives up before the turn has come is not served to nobody: the future is cancelled.
            turn = self._turns.submit(self._worker.ask, method, *args, seconds=WORK)
            return await asyncio.wait_for(asyncio.wrap_future(turn), PATIENCE)
        except (TimeoutError, asyncio.TimeoutError):
            raise Busy(f"This took longer than {PATIENCE} seconds. Please try again.") from None
        finally:
            self.waiting -= 1


def _examples(weights: Path, folder: str | None) -> list[Path]:
    """Images spread over a folder, over the validation images of a run, or one that a package brings along."""
    found = list(find_images([folder])) if folder else []
    config = (weights if weights.is_dir() else weights.parent) / "config.yaml"
    if not folder and config.is_file():
        with contextlib.suppress(yaml.YAMLError, AttributeError):  # not a run's file after all
            data = Path(str(yaml.safe_load(config.read_text(encoding="utf-8")).get("data")))
            for place in (data / "val", data / "val2017", data / "images" / "validation"):
                with contextlib.suppress(UserError):  # full of tar shards
                    found = found or (list(find_images([place])) if place.is_dir() else [])
    if not found:
        brought = Path(require("matplotlib", extra="train").get_data_path()) / "sample_data" / "grace_hopper.jpg"
        found += [brought] if brought.is_file() else []
    paths = [path for path in found if isinstance(path, Path)]
    return [paths[i * len(paths) // EXAMPLES] for i in range(EXAMPLES)] if len(paths) > EXAMPLES else paths
