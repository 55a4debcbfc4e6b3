"""The page: an image with a network's prediction and attention maps, and optionally a second network beside it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from nicegui import ui
from nicegui.element import Element
from PIL import Image

from sgformer.app.networks import FORMATS
from sgformer.app.session import MAX_BYTES, Busy, Result, Session
from sgformer.app.worker import Stopped
from sgformer.tasks.registry import get_task

STYLE = (Path(__file__).parent / "page.css").read_text(encoding="utf-8")


class Viewer(Element, component="viewer.js"):
    """The image with a map over it; hovering is handled in the browser."""

    def show(self, result: Result, kind: str, block: str, opacity: float) -> None:
        self.props["result"], self.props["kind"], self.props["block"] = result.id, kind, block
        self.props["opacity"] = opacity
        self.update()


class Drop(Element, component="drop.js"):
    """Uploads a dropped, pasted or selected image to `POST /explain`."""


class Panel:
    """One network's prediction and maps.

    Args:
        networks: the selectable names.
        selected: the name selected at first.
        kind: the map shown at first.
        on_network: called when another network is selected.
        on_map: called when another map is selected.

    The dial for tokens is at 0 for as many as the network was trained with; a step is a factor of the square root of 2.
    Like another network, another number of tokens calls `on_network`.
    """

    def __init__(
        self, networks: list[str], selected: str, kind: str, on_network: Callable[[], Any], on_map: Callable[[], Any]
    ):
        self.result: Result | None = None
        with ui.element("section").classes("sg-panel") as self.frame:
            with ui.element("div").classes("sg-choices"):
                self.network = ui.select(networks, value=selected, label="network", on_change=on_network).props(SELECT)
                self.kind = ui.select([kind], value=kind, label="map", on_change=on_map).props(SELECT)
                with ui.element("div").classes("sg-dial"):
                    self.spent = ui.label().classes("sg-where")
                    self.dial = ui.slider(min=-4, max=4, step=1, value=0, on_change=self._turned)
                    self.dial.props('aria-label="key/value tokens" markers snap').on("change", on_network)
            self._turned()
            with ui.element("div").classes("sg-result"):
                with ui.element("div").classes("sg-left"):
                    self.viewer = Viewer()
                    self.scale = ui.element("div").classes("sg-scale")
                self.prediction = ui.element("div").classes("sg-prediction")

    @property
    def budget(self) -> float:
        """The token budget that the dial is at."""
        return float(2 ** (self.dial.value / 2))

    def _turned(self) -> None:
        self.spent.text = f"tokens x {self.budget:.2g}"

    def enable_dial(self, enabled: bool) -> None:
        """A network that makes no tokens has none to set."""
        self.dial.set_enabled(enabled)
        if not enabled:
            self.dial.set_value(0)

    def take(self, result: Result) -> None:
        """Show another result: its prediction, and the maps it has."""
        self.result = result
        kinds = result.kinds()
        self.kind.set_options(kinds, value=self.kind.value if self.kind.value in kinds else "significance")
        self.prediction.clear()
        with self.prediction:
            _prediction(result)

    def show(self, depth: float, opacity: float) -> str:
        """Show the map at a relative depth, 0 for the first block and 1 for the last; returns the block's label."""
        assert self.result is not None
        blocks = list(self.result.explanation.significance)
        block = blocks[round(depth * (len(blocks) - 1))]
        if self.kind.value in ("regions", "spent") and self.result.guided(block) is None:
            self.kind.value = "significance"
        self.viewer.show(self.result, self.kind.value, block, opacity)
        self.scale.clear()
        with self.scale:
            _scale(self.result, self.kind.value, block)
        height, width = self.result.explanation.significance[block].shape
        stage, number = block.split(".")
        guided = self.result.guided(block)
        made = f" · {self.result.explanation.tokens[guided].max() + 1} key/value tokens" if guided else ""
        self.spent.text = f"tokens x {self.result.budget:.2g}{made}"
        return f"stage {stage}, block {int(number) + 1} · {height} x {width} places"


SELECT = "outlined dense options-dense"


def _prediction(result: Result) -> None:
    """The prediction as labelled bars, and for dense tasks also as a picture."""
    if result.explanation.overlay is not None:
        ui.image(f"/results/{result.id}/answer.png").props("no-spinner no-transition").classes("sg-overlay")
    entries, task = result.summary(), get_task(result.network.task)
    if not entries:
        ui.label(task.nothing(result.network.score)).classes("sg-quiet")
    for entry in entries[:12]:
        colour = entry.get("colour", "var(--sg-accent)")
        with ui.element("div").classes("sg-row"):
            ui.label(entry["class"]).classes("sg-name").tooltip(entry["class"])
            with ui.element("div").classes("sg-track"):
                ui.element("div").style(f"width: {100 * entry['share']:.1f}%; background: {colour}")
            ui.label(_percent(entry["share"])).classes("sg-share")
    if len(entries) > 12:
        ui.label(f"and {len(entries) - 12} more").classes("sg-quiet")
    with ui.element("div").classes("sg-foot"):
        ui.label(task.quantity).classes("sg-quiet")
        name = f"{result.network.name.replace(', ', '-').replace(' ', '-').replace('/', '-')}.png"
        ui.button(
            "Sheet", icon="download", on_click=lambda: ui.download(f"/results/{result.id}/sheet.png", name)
        ).props("flat dense no-caps").classes("sg-sheet").tooltip(
            "Every stage on one page, as `sgformer explain` draws it"
        )


def _percent(share: float) -> str:
    return "< 1 %" if 0 < share < 0.01 else f"{100 * share:.0f} %"


def _scale(result: Result, kind: str, block: str) -> None:
    """The legend of a map's colours."""
    if kind == "regions":
        tokens = result.tokens(block)
        assert tokens is not None
        rates = result.explanation.rates[str(result.guided(block))]
        for name, colour, rate in zip(tokens["names"], tokens["colours"], rates, strict=True):
            ui.element("i").classes("sg-dot").style(f"background: rgb{tuple(colour)}")
            ui.label(f"{name} {rate} : 1")
        return
    ends = {"spent": ("few tokens", "many"), "significance": ("low", "high")}.get(kind, ("least attention", "most"))
    ui.label(ends[0])
    ui.element("div").classes("sg-bar" + (" sg-magma" if kind == "spent" else ""))
    ui.label(ends[1])


class Page:
    """The page of one browser tab."""

    def __init__(self, session: Session):
        self.session = session
        self.picture: Image.Image | None = None
        names = list(session.networks)
        ui.add_css(STYLE)
        ui.colors(primary="#1d7f7a")
        self._header()
        with ui.element("main").classes("sg-main"):
            with ui.element("aside").classes("sg-aside"):
                self.drop = Drop()
                self.drop.props["limit"] = MAX_BYTES
                self.drop.props["formats"] = ", ".join(FORMATS[:-1]).replace("WEBP", "WebP")
                self.drop.props["network"], self.drop.props["tokens"] = session.checkpoints[0], 1.0
                self.drop.on("sent", lambda: self._busy(True))
                self.drop.on("explained", lambda event: self._uploaded(str(event.args)))
                self.drop.on("failed", lambda event: self._fail(str(event.args)))
                self.error = ui.label().classes("sg-error").props('role="alert"')
                self.error.set_visibility(False)
                if session.examples:
                    ui.label("or try one of these").classes("sg-quiet")
                with ui.element("div").classes("sg-examples"):
                    for number, picture in enumerate(session.examples):
                        with (
                            ui.element("button")
                            .classes("sg-example")
                            .props(f'type="button" aria-label="example {number + 1}"')
                            .on("click", lambda _, picture=picture: self.explain(picture))
                        ):
                            ui.element("img").props(f'src="/examples/{number}.jpg" alt=""')
            with ui.element("div").classes("sg-work"):
                self._controls()
                with ui.element("div").classes("sg-panels") as self.panels:
                    self.left = Panel(names, session.checkpoints[0], "significance", self._select_left, self.show)
                    other = session.checkpoints[1] if len(session.checkpoints) > 1 else session.checkpoints[0]
                    self.right = Panel(names, other, "significance", self._explain_right, self.show)
                self.right.frame.set_visibility(False)
                self._enable_dials()

    def _header(self) -> None:
        network = self.session.networks[self.session.checkpoints[0]]
        about = [network.model, f"{network.parameters / 1e6:.3g} M parameters", get_task(network.task).title]
        count = len(network.classes)
        about += [f"{count} class{'es' * (count != 1)}"] if count else []
        with ui.element("header").classes("sg-header"):
            ui.html(LOGO, sanitize=False)
            ui.label("SG-Former").classes("sg-title")
            ui.label("where a network attends, and where it spends its tokens").classes("sg-quiet sg-motto")
            ui.space()
            ui.label(" · ".join(about)).classes("sg-quiet sg-about")

    def _controls(self) -> None:
        with ui.element("div").classes("sg-controls"):
            with ui.element("div").classes("sg-control sg-wide"):
                self.where = ui.label("stage").classes("sg-where")
                self.depth = ui.slider(min=0, max=1, step=1, value=0, on_change=self.show)
                self.depth.props('aria-label="stage and block" markers snap')
            with ui.element("div").classes("sg-control"):
                ui.label("opacity").classes("sg-where")
                self.opacity = ui.slider(min=0, max=100, step=5, value=65, on_change=self.show)
                self.opacity.props('aria-label="opacity"')
            self.compare = ui.switch("side by side", on_change=self._compare).props("dense").classes("sg-compare")

    # -- events --------------------------------------------------------------------------------------------------------

    async def explain(self, picture: Image.Image) -> None:
        """Explain and show an image that is already on the server."""
        self._busy(True)
        try:
            self._take(await self.session.explain(picture, self.left.network.value, self.left.budget))
        except (Busy, Stopped) as error:
            self._fail(str(error))
        else:
            await self._explain_right()

    async def _uploaded(self, id: str) -> None:
        try:
            self._take(self.session.find(id))
        except KeyError:
            self._fail("The server is busy and has discarded this result. Please try again.")
        else:
            await self._explain_right()

    def _take(self, result: Result) -> None:
        self.picture = result.picture
        self.left.take(result)
        self.depth.props["max"] = max(1, len(result.explanation.significance) - 1)
        self.depth.set_value(min(self.depth.value, self.depth.props["max"]))
        self.depth.update()
        self._busy(False)
        self.show()

    async def _explain_right(self) -> None:
        self._enable_dials()
        if not self.compare.value or self.picture is None:
            return
        try:
            self.right.take(await self.session.explain(self.picture, self.right.network.value, self.right.budget))
        except (Busy, Stopped) as error:
            self._fail(str(error))
        else:
            self.show()

    async def _select_left(self) -> None:
        self._enable_dials()
        self.drop.props["network"], self.drop.props["tokens"] = self.left.network.value, self.left.budget
        self.drop.update()
        if self.picture is not None:
            await self.explain(self.picture)

    def _enable_dials(self) -> None:
        for panel in (self.left, self.right):
            panel.enable_dial(self.session.networks[panel.network.value].guided)

    async def _compare(self) -> None:
        self.panels.classes(toggle="sg-two")
        if self.compare.value:
            await self._explain_right()
        self.right.frame.set_visibility(self.compare.value)

    def show(self) -> None:
        """Redraw the maps for the sliders' values."""
        depth = self.depth.value / self.depth.props["max"]
        opacity = self.opacity.value / 100
        if self.left.result is not None:
            self.where.text = self.left.show(depth, opacity)
        if self.right.result is not None and self.compare.value:
            self.right.show(depth, opacity)

    def _busy(self, busy: bool) -> None:
        self.error.set_visibility(False)
        self.panels.classes(**{"add" if busy else "remove": "sg-busy"})

    def _fail(self, message: str) -> None:
        self._busy(False)
        self.error.text = message[:1].upper() + message[1:]
        self.error.set_visibility(True)


LOGO = (
    '<svg class="sg-logo" viewBox="0 0 4 4" shape-rendering="crispEdges" aria-hidden="true">'
    '<rect width="4" height="4" fill="#440154"/><rect x="1" width="2" height="4" fill="#21918c"/>'
    '<rect y="1" width="4" height="2" fill="#21918c"/><rect x="1" y="1" width="2" height="2" fill="#fde725"/></svg>'
)


def add_page(session: Session) -> None:
    """Register the page at `/`; it opens with the first example."""

    @ui.page("/", title="SG-Former")
    async def page() -> None:
        content = Page(session)
        if session.examples:
            await ui.context.client.connected()
            await content.explain(session.examples[0])
