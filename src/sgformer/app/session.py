"""The page's session: the queue for the networks, its limits, and the results."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import io
import logging
import secrets
import weakref
from collections import deque
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sgformer.app.networks import Network, Networks, reduced
from sgformer.app.worker import Failed, Stopped, Worker
from sgformer.core.errors import UserError, require
from sgformer.core.names import is_remote
from sgformer.core.parse import read_yaml
from sgformer.data.image import find_images, read_image
from sgformer.models.config import TOKEN_BUDGETS
from sgformer.results import Explanation
from sgformer.tasks.registry import get_task
from sgformer.viz.significance import colour_map, region_colours, region_names

log = logging.getLogger("sgformer")

#: Maximum bytes of an upload, and maximum seconds for it to arrive.
MAX_BYTES, ARRIVAL = 20 * 2**20, 30
#: Maximum seconds of computation per image, and of queueing and computation together.
WORK, PATIENCE = 60, 150
#: Maximum length of the queue, uploads that are still arriving included; further requests are rejected.
QUEUE = 50
#: Maximum number of open connections, of which a visitor's browser needs up to seven; further ones are closed.
CONNECTIONS = 400
#: Number of recent results kept; older ones live as long as a page shows them.
RECENT = 24
EXAMPLES = 9


class Busy(Exception):
    """The queue is full, or waiting took too long. The message is shown to the visitor."""


def png(pixels: np.ndarray) -> bytes:
    """(H, W, 3) uint8 as the bytes of a PNG."""
    out = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(out, "PNG")
    return out.getvalue()


@dataclasses.dataclass(frozen=True, eq=False)
class Result:
    """A network's explanation of one image.

    Attributes:
        id: unguessable; part of the URLs of its pictures.
        network: the network that produced it.
        picture: the image.
        explanation: maps, regions, tokens and prediction of the forward pass.
        budget: key/value tokens as a multiple of those the network was trained with.
    """

    id: str
    network: Network
    picture: Image.Image
    explanation: Explanation
    budget: float = 1.0

    def summary(self) -> list[dict[str, Any]]:
        """The prediction, JSON-serialisable; see `Task.summary`."""
        if not self.network.predicts:
            return []
        return get_task(self.network.task).summary(self.explanation, self.network.classes)

    def kinds(self) -> dict[str, str]:
        """The maps available as overlays: name -> label on the page."""
        named = {"significance": "significance", "coarse": "coarse heads", "fine": "fine heads"}
        return named | ({"regions": "regions", "spent": "tokens spent"} if self.explanation.tokens else {})

    def guided(self, block: str) -> str | None:
        """The self-guided block that sorts by the map of a hybrid-scale block, which must be there; or None."""
        stage, number = block.split(".")
        after = f"{stage}.{int(number) + 1}"
        return after if after in self.explanation.tokens else None

    def map(self, kind: str, block: str) -> bytes:
        """A map as a PNG with one pixel per token.

        Raises:
            KeyError: the block has no such map.
        """
        if kind not in self.kinds() or block not in self.explanation.significance:
            raise KeyError(f"{kind}/{block}")
        if kind in ("significance", "coarse", "fine"):
            return png(colour_map(getattr(self.explanation, kind)[block]))
        guided = self.guided(block)
        if guided is None:
            raise KeyError(f"{kind}/{block}")
        if kind == "spent":
            return png(colour_map(np.log(self.explanation.density(guided)), "magma"))
        colours = np.array([_rgb(c) for c in region_colours(len(self.explanation.rates[guided]))], np.uint8)
        return png(colours[self.explanation.regions[guided]])

    def tokens(self, block: str) -> dict[str, Any] | None:
        """The token assignment in the viewer's format; None if the block's map guides no reallocation.

        Raises:
            KeyError: there is no such block.
        """
        if block not in self.explanation.significance:
            raise KeyError(block)
        guided = self.guided(block)
        if guided is None:
            return None
        tokens, rates = self.explanation.tokens[guided], self.explanation.rates[guided]
        return {
            "height": tokens.shape[0],
            "width": tokens.shape[1],
            "tokens": tokens.ravel().tolist(),
            "regions": self.explanation.regions[guided].ravel().tolist(),
            "count": int(tokens.max()) + 1,
            "names": region_names(len(rates)),
            "colours": [_rgb(c) for c in region_colours(len(rates))],
        }


def _rgb(colour: str) -> tuple[int, int, int]:
    red, green, blue = bytes.fromhex(colour.removeprefix("#"))
    return red, green, blue


class Session:
    """Queues all requests for networks in one worker; methods other than `explain` and `sheet` return at once.

    Args:
        worker: runs a `Networks`; `load` creates both.
        examples: sample images offered on the page.
    """

    def __init__(self, worker: Any, examples: Sequence[Image.Image] = ()):
        self.networks: dict[str, Network] = {network.name: network for network in worker.call("describe")}
        self.checkpoints = [name for name, network in self.networks.items() if network.ranking is None]
        self.examples = list(examples)
        self.waiting = 0
        self._worker = worker
        self._turns = ThreadPoolExecutor(1, "sgformer-turn")
        self._recent: deque[Result] = deque(maxlen=RECENT)
        self._shown: weakref.WeakValueDictionary[str, Result] = weakref.WeakValueDictionary()

    @classmethod
    def load(cls, weights: Sequence[str], examples: str | None = None, device: str = "auto") -> Session:
        """A session with a worker of its own; the caller must close it.

        Args:
            weights: one or two run folders or weights files.
            examples: a folder of sample images; by default validation images of the first run.
            device: "auto", "cpu", "cuda" ...

        Raises:
            UserError: the weights, the examples or the device are invalid.
        """
        pictures = [reduced(read_image(path)) for path in _examples(Path(weights[0]), examples)]
        return cls(Worker(Networks, list(weights), device), pictures)

    def close(self) -> None:
        """End the worker, whatever it is doing."""
        self._worker.close()
        self._turns.shutdown(cancel_futures=True)

    def find(self, id: str) -> Result:
        """The result with this id; raises KeyError if it has expired."""
        return self._shown[id]

    async def explain(self, picture: Image.Image | bytes, network: str | None = None, budget: float = 1.0) -> Result:
        """Queue, then explain an image with a network, by default the first, at a token budget.

        Raises:
            UserError: the bytes are not an accepted image, or the budget is out of range.
            KeyError: there is no network of this name.
            Busy, Stopped: the queue is full; see `_call`.
        """
        selected = self.networks[network or self.checkpoints[0]]
        with self._place():
            return await self._explain(selected, picture, budget)

    async def upload(
        self, read: Callable[[], Awaitable[bytes]], network: str | None = None, budget: float = 1.0
    ) -> Result:
        """As `explain`, of an image that has yet to arrive: it has its place in the queue before it is read.

        Raises:
            Exception: as `explain`, and of `read`.
        """
        selected = self.networks[network or self.checkpoints[0]]
        with self._place():
            return await self._explain(selected, await read(), budget)

    async def _explain(self, network: Network, picture: Image.Image | bytes, budget: float) -> Result:
        least, most = TOKEN_BUDGETS
        if not (least <= budget <= most and (network.guided or budget == 1)):
            raise UserError(f"tokens must be between {least:g} and {most:g}, and 1 for a network that makes none")
        image, explanation = await self._call("explain", network.name, picture, budget)
        result = Result(secrets.token_urlsafe(12), network, image, explanation, budget)
        self._recent.append(result)
        self._shown[result.id] = result
        return result

    async def sheet(self, result: Result) -> bytes:
        """A result's sheet, as of `sgformer explain`, as a PNG; queues and raises as `explain` does."""
        tokens = f"tokens x {result.budget:.2g}" if result.budget != 1 else ""
        lines = filter(None, [result.network.name, tokens, result.explanation.title])
        with self._place():
            return await self._call("sheet", dataclasses.replace(result.explanation, title="\n".join(lines)))

    @contextlib.contextmanager
    def _place(self) -> Iterator[None]:
        """A place in the queue; raises Busy if that is full."""
        if self.waiting >= QUEUE:
            raise Busy("Too many requests are waiting. Please try again in a minute.")
        self.waiting += 1
        try:
            yield
        finally:
            self.waiting -= 1

    async def _call(self, method: str, *args: Any) -> Any:
        """Call a method in the worker, first come, first served.

        Raises:
            Busy: the result did not arrive within `PATIENCE` seconds.
            Stopped: the computation exceeded `WORK` seconds or failed, or the worker died.
        """
        try:
            # A request that times out in the queue is never computed: its future is cancelled.
            future = self._turns.submit(self._worker.call, method, *args, seconds=WORK)
            return await asyncio.wait_for(asyncio.wrap_future(future), PATIENCE)
        except (TimeoutError, asyncio.TimeoutError):
            raise Busy(f"This took longer than {PATIENCE} seconds. Please try again.") from None
        except Failed as error:
            log.exception("a request failed", exc_info=error)
            raise Stopped("The network failed on this image; the server's log says why.") from None


def _examples(weights: Path, folder: str | None) -> list[Path]:
    """Images spread over a folder, over a run's validation images, or else matplotlib's sample image."""
    images = find_images(folder) if folder else []
    config = (weights if weights.is_dir() else weights.parent) / "config.yaml"
    if not folder and config.is_file():
        with contextlib.suppress(UserError, AttributeError):  # not a run's config after all
            stored = str(read_yaml(config).get("data"))
            data = Path("" if is_remote(stored) else stored)
            for place in (data / "val", data / "val2017", data / "images" / "validation"):
                with contextlib.suppress(UserError):  # holds tar shards only
                    images = images or (find_images(place) if place.is_dir() else [])
    if not images:
        sample = Path(require("matplotlib", extra="train").get_data_path()) / "sample_data" / "grace_hopper.jpg"
        images += [sample] if sample.is_file() else []
    return [images[i * len(images) // EXAMPLES] for i in range(EXAMPLES)] if len(images) > EXAMPLES else images
