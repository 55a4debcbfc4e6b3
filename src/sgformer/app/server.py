"""HTTP of the page: images in, results out, and a guard in front of everything."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import io
import ipaddress
import signal
import socket
import sys
import warnings
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import urlsplit

from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse, Response

from sgformer.app import session as bounds
from sgformer.app.session import Busy, Result, Session, png
from sgformer.app.worker import Stopped
from sgformer.core.errors import UserError

Message = MutableMapping[str, Any]

#: The browser itself refuses whatever does not come from this server. NiceGUI compiles templates in the page.
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; "
    "object-src 'none'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
}


class Guard:
    """ASGI middleware: no other site may use the page from a visitor's browser, and no body is long or slow.

    Args:
        app: what is guarded.
        hosts: the names under which the page may be asked for, without ports; None: any. A site that lets its own name
            point here (DNS rebinding) is refused by its name.
    """

    def __init__(self, app: Any, hosts: frozenset[str] | None):
        self.app, self.hosts = app, hosts

    async def __call__(self, scope: Message, receive: Callable[[], Awaitable[Message]], send: Any) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        if not self._ours(headers.get("host", ""), headers.get("origin")):
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1008})
            else:
                await JSONResponse({"error": "asked for by another site"}, 403)(scope, receive, send)  # type: ignore[arg-type]
            return
        if scope["type"] == "websocket":
            await self.app(scope, receive, send)
            return
        length = headers.get("content-length", "0")
        if not length.isdigit() or int(length) > bounds.MAX_BYTES:
            await refuse_length()(scope, receive, send)  # type: ignore[arg-type]
            return

        async def guarded_send(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [
                    *message.get("headers", []),
                    *((name.encode(), value.encode()) for name, value in HEADERS.items()),
                ]
            await send(message)

        await self.app(scope, receive, guarded_send)

    def _ours(self, host: str, origin: str | None) -> bool:
        """Whether the page is asked for by a name of its own, and by itself."""
        try:
            known = self.hosts is None or urlsplit(f"//{host}").hostname in self.hosts
            return known and (origin is None or urlsplit(origin).netloc == host)
        except ValueError:
            return False


def refuse_length() -> JSONResponse:
    """Nothing more is read from the one who sends too much."""
    said = f"The file is larger than {bounds.MAX_BYTES // 2**20} MB."
    return JSONResponse({"error": said}, 413, {"connection": "close"})


def refusal(error: Busy | Stopped) -> HTTPException:
    """Later it may go (503); what was stopped will not (504)."""
    return HTTPException(504 if isinstance(error, Stopped) else 503, str(error))


async def read_body(request: Request) -> bytes:
    """The bytes of a request, in memory.

    Raises:
        HTTPException: too many (413) or too slow (408).
    """
    body = io.BytesIO()

    async def fill() -> None:
        async for part in request.stream():
            if body.tell() + len(part) > bounds.MAX_BYTES:  # sent in chunks, without a length
                raise HTTPException(413, f"The file is larger than {bounds.MAX_BYTES // 2**20} MB.")
            body.write(part)

    try:
        await asyncio.wait_for(fill(), bounds.ARRIVAL)
    except (TimeoutError, asyncio.TimeoutError):
        raise HTTPException(408, f"The file took longer than {bounds.ARRIVAL} seconds to arrive.") from None
    return body.getvalue()


def build(session: Session) -> FastAPI:
    """The application: `POST /explain` takes an image's bytes; the result's pictures are under `/results/ID/`."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)  # FastAPI's own pages load scripts from elsewhere
    thumbnails = []
    for picture in session.examples:
        small = picture.copy()
        small.thumbnail((192, 192))
        thumbnails.append(_jpeg(small))

    @app.exception_handler(HTTPException)
    async def say(_: Request, error: HTTPException) -> JSONResponse:
        return JSONResponse({"error": error.detail}, error.status_code)

    def find(id: str) -> Result:
        try:
            return session.find(id)
        except KeyError:
            raise HTTPException(404, "This result is no longer kept. Please show the image again.") from None

    @app.post("/explain")
    async def explain(request: Request, network: str | None = None) -> dict[str, Any]:
        data = await read_body(request)
        try:
            seen = await session.explain(data, network)
        except UserError as error:
            raise HTTPException(400, str(error)) from None
        except (Busy, Stopped) as error:
            raise refusal(error) from None
        except KeyError:
            raise HTTPException(404, f"There is no network named {network!r}.") from None
        return {
            "result": seen.id,
            "network": seen.network.name,
            "task": seen.network.task,
            "answer": seen.answer(),
            "blocks": list(seen.seen.significance),
        }

    @app.get("/results/{id}/image.png")
    def image(id: str) -> Response:
        return as_png(png(find(id).seen.image))

    @app.get("/results/{id}/answer.png")
    def answer(id: str) -> Response:
        overlay = find(id).seen.overlay
        if overlay is None:
            raise HTTPException(404, "Classifiers answer in words.")
        return as_png(png(overlay))

    @app.get("/results/{id}/sheet.png")
    async def sheet(id: str) -> Response:
        try:
            return as_png(await session.sheet(find(id)))
        except (Busy, Stopped) as error:
            raise refusal(error) from None

    @app.get("/results/{id}/tokens/{block}")
    def tokens(id: str, block: str) -> JSONResponse:
        return JSONResponse(find(id).tokens(block), headers=KEEP)

    @app.get("/results/{id}/{kind}/{block}.png")
    def layer(id: str, kind: str, block: str) -> Response:
        try:
            return as_png(find(id).map(kind, block))
        except KeyError:
            raise HTTPException(404, f"There is no map {kind} of block {block}.") from None

    @app.get("/examples/{number}.jpg")
    def example(number: int) -> Response:
        if not 0 <= number < len(thumbnails):
            raise HTTPException(404, "There is no such example.")
        return Response(thumbnails[number], media_type="image/jpeg")

    return app


#: What is found under a result's id never changes.
KEEP = {"cache-control": "private, max-age=3600, immutable"}


def as_png(data: bytes) -> Response:
    return Response(data, media_type="image/png", headers=KEEP)


def _jpeg(image: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, "JPEG", quality=88)
    return out.getvalue()


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach what is bound to a host."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def bind(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes any that is free.

    Raises:
        UserError: it cannot be had.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(128)
    except (OSError, OverflowError) as error:
        hint = "; pass another --port" if getattr(error, "errno", None) == errno.EADDRINUSE else ""
        why = getattr(error, "strerror", None) or error
        raise UserError(f"cannot listen on {host}, port {port}: {why}{hint}") from None
    return listener


def serve(session: Session, listener: socket.socket, host: str, ready: Callable[[str], None]) -> None:
    """Serve the page until interrupted (ctrl-C, or SIGTERM: exits with status 143).

    Args:
        session: what is asked.
        listener: where to listen, from `bind`.
        host: its name in the page's address.
        ready: called with that address once whoever follows it is answered.
    """
    import uvicorn
    from nicegui import ui

    from sgformer.app.page import add_page

    app = build(session)
    add_page(session)
    ui.run_with(app, title="SG-Former", favicon=FAVICON, tailwind=False, show_welcome_message=False)
    hosts = frozenset({"localhost", "127.0.0.1", "::1", host}) if is_loopback(host) else None

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            ready(f"http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}")

    config = uvicorn.Config(Guard(app, hosts), log_level="warning", timeout_graceful_shutdown=2, ws_max_size=2**20)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # uvicorn raises it again once it has shut down
    # NiceGUI looks through all objects for its server, and torch has some that warn when they are looked at.
    warnings.filterwarnings("ignore", category=FutureWarning, module="nicegui")
    with contextlib.suppress(KeyboardInterrupt):
        Server(config).run([listener])


FAVICON = (
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 4 4" shape-rendering="crispEdges">'
    '<rect width="4" height="4" fill="#440154"/><rect x="1" width="2" height="4" fill="#21918c"/>'
    '<rect x="1" y="1" width="2" height="2" fill="#fde725"/></svg>'
)
