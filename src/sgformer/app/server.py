"""The page's HTTP server: uploads in, results out, behind a request guard."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import io
import ipaddress
import logging
import re
import signal
import socket
import sys
import warnings
from collections.abc import Awaitable, Callable, Iterable, Mapping, MutableMapping, Sequence
from typing import Any
from urllib.parse import urlsplit

from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse, Response
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect

from sgformer.app import session as bounds
from sgformer.app.session import Busy, Result, Session, png
from sgformer.app.worker import Stopped
from sgformer.core.errors import UserError
from sgformer.core.names import printable
from sgformer.core.terminal import escape_log

Message = MutableMapping[str, Any]

#: The browser blocks everything that is not from this server. NiceGUI compiles templates in the page, hence the evals.
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; "
    "object-src 'none'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
)
TOO_LARGE = f"The file is larger than {bounds.MAX_BYTES // 2**20} MB."
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
}


class Guard:
    """ASGI middleware: rejects cross-site requests and oversized bodies, and adds security headers.

    Browsers say where a request comes from: in Sec-Fetch-Site, if the page is on loopback or behind TLS, and in Origin,
    except of page loads and pictures. What is not a browser says neither.

    Args:
        app: the guarded ASGI application.
    """

    def __init__(self, app: Any):
        self.app = app

    async def __call__(self, scope: Message, receive: Callable[[], Awaitable[Message]], send: Any) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        if not _same_site(headers):
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1008})
            else:
                await JSONResponse({"error": CROSS_SITE}, 403)(scope, receive, send)  # type: ignore[arg-type]
            return
        if scope["type"] == "websocket":
            await self.app(scope, receive, send)
            return
        length = headers.get("content-length", "0")
        if not (length.isascii() and length.isdigit() and len(length) < 20) or int(length) > bounds.MAX_BYTES:
            await body_too_large()(scope, receive, send)  # type: ignore[arg-type]
            return

        async def guarded_send(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [
                    *message.get("headers", []),
                    *((name.encode(), value.encode()) for name, value in HEADERS.items()),
                ]
            await send(message)

        await self.app(scope, receive, guarded_send)


CROSS_SITE = "Another site requested this. Type the page's address, or copy it into the address bar."


def _same_site(headers: Mapping[str, str]) -> bool:
    """Whether a request is of the page itself or of its visitor, as far as the browser says."""
    if headers.get("sec-fetch-site", "none") not in ("none", "same-origin"):
        return False
    try:
        return headers.get("origin") is None or urlsplit(headers["origin"]).netloc == headers.get("host")
    except ValueError:
        return False


def guard(app: Any, hosts: Iterable[str]) -> Guard:
    """An application behind `Guard` that answers to these host names alone: DNS rebinding, where another site's name
    resolves to this server, brings another one."""
    allowed = [f"[{name}]" if ":" in name else name for name in hosts]
    return Guard(TrustedHostMiddleware(app, allowed, www_redirect=False))


def host_names(host: str, allowed: Sequence[str]) -> set[str]:
    """The host names to which a server bound to `host` answers: as given, and loopback's if that reaches it.

    Args:
        host: the address listened on.
        allowed: further names.

    Raises:
        UserError: something else than a name or an address, or no name by which others could call the server.
    """
    for name in allowed:
        if not re.fullmatch(r"[A-Za-z0-9_.-]+|[0-9A-Fa-f:.]+", name):
            raise UserError(f"--allow-host {printable(name)}: give a name or an address alone, e.g. page.example.org")
    everywhere = host in ("", "0.0.0.0", "::")
    if everywhere and not allowed:
        raise UserError(
            f"--host {host}: name the addresses that visitors will type with --allow-host, e.g. --allow-host "
            f"{socket.gethostname()}; requests for other names are refused"
        )
    own = {"localhost", "127.0.0.1", "::1"} if everywhere or is_loopback(host) else set()
    return {*own, *allowed, *([] if everywhere else [host])}


def body_too_large() -> JSONResponse:
    """413, and the connection is closed without reading the body."""
    return JSONResponse({"error": TOO_LARGE}, 413, {"connection": "close"})


def unavailable(error: Busy | Stopped) -> HTTPException:
    """503 if a retry may succeed, 504 if the same request would be stopped again."""
    return HTTPException(504 if isinstance(error, Stopped) else 503, str(error), {"connection": "close"})


async def read_body(request: Request) -> bytes:
    """Read the body of a request into memory.

    Raises:
        HTTPException: the body is too large (413), arrives too slowly (408) or breaks off (400, which nobody reads).
    """
    body = io.BytesIO()

    async def fill() -> None:
        async for part in request.stream():
            if body.tell() + len(part) > bounds.MAX_BYTES:  # chunked transfer, without a content length
                raise HTTPException(413, TOO_LARGE)
            body.write(part)

    try:
        await asyncio.wait_for(fill(), bounds.ARRIVAL)
    except (TimeoutError, asyncio.TimeoutError):
        raise HTTPException(408, f"The file took longer than {bounds.ARRIVAL} seconds to arrive.") from None
    except ClientDisconnect:
        raise HTTPException(400, "The upload broke off.") from None
    return body.getvalue()


def build(session: Session) -> FastAPI:
    """Build the application: `POST /explain` takes the bytes of an image, `/results/ID/` serves its pictures."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)  # FastAPI's own pages load third-party scripts
    thumbnails = {}
    for number, picture in enumerate(session.examples):
        small = picture.copy()
        small.thumbnail((192, 192))
        thumbnails[str(number)] = _jpeg(small)

    @app.exception_handler(HTTPException)
    async def to_json(_: Request, error: HTTPException) -> JSONResponse:
        return JSONResponse({"error": error.detail}, error.status_code, error.headers)

    def find(id: str) -> Result:
        try:
            return session.find(id)
        except KeyError:
            raise HTTPException(404, "This result has expired. Please upload the image again.") from None

    @app.post("/explain")
    async def explain(request: Request, network: str | None = None, tokens: float = 1.0) -> dict[str, Any]:
        try:
            result = await session.upload(lambda: read_body(request), network, tokens)
        except UserError as error:
            raise HTTPException(400, str(error)) from None
        except (Busy, Stopped) as error:
            raise unavailable(error) from None
        except KeyError:
            raise HTTPException(404, f"There is no network named {network!r}.") from None
        return {
            "result": result.id,
            "network": result.network.name,
            "task": result.network.task,
            "answer": result.summary(),
            "blocks": list(result.explanation.significance),
        }

    @app.get("/results/{id}/image.png")
    def image(id: str) -> Response:
        return as_png(png(find(id).explanation.image))

    @app.get("/results/{id}/answer.png")
    def answer(id: str) -> Response:
        overlay = find(id).explanation.overlay
        if overlay is None:
            raise HTTPException(404, "A classifier's prediction has no picture.")
        return as_png(png(overlay))

    @app.get("/results/{id}/sheet.png")
    async def sheet(id: str) -> Response:
        try:
            return as_png(await session.sheet(find(id)))
        except (Busy, Stopped) as error:
            raise unavailable(error) from None

    @app.get("/results/{id}/tokens/{block}")
    def tokens(id: str, block: str) -> JSONResponse:
        try:
            return JSONResponse(find(id).tokens(block), headers=KEEP)
        except KeyError:
            raise HTTPException(404, f"There is no block {block}.") from None

    @app.get("/results/{id}/{kind}/{block}.png")
    def layer(id: str, kind: str, block: str) -> Response:
        try:
            return as_png(find(id).map(kind, block))
        except KeyError:
            raise HTTPException(404, f"Block {block} has no map {kind}.") from None

    @app.get("/examples/{number}.jpg")
    def example(number: str) -> Response:
        if number not in thumbnails:
            raise HTTPException(404, f"There is no example {number}.")
        return Response(thumbnails[number], media_type="image/jpeg")

    return app


#: The content under a result's id never changes.
KEEP = {"cache-control": "private, max-age=3600, immutable"}


def as_png(data: bytes) -> Response:
    return Response(data, media_type="image/png", headers=KEEP)


def _jpeg(image: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, "JPEG", quality=88)
    return out.getvalue()


def is_loopback(host: str) -> bool:
    """Whether a server bound to this host is reachable from this machine only."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def bind(host: str, port: int) -> socket.socket:
    """Open a listening socket; port 0 picks a free one.

    Raises:
        UserError: the address or the port is invalid or in use.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(128)
    except (OSError, OverflowError, UnicodeError) as error:
        hint = "; pass another --port" if getattr(error, "errno", None) == errno.EADDRINUSE else ""
        why = getattr(error, "strerror", None) or error
        raise UserError(f"cannot listen on {host}, port {port}: {why}{hint}") from None
    return listener


def bounded(protocol: type[Any]) -> type[Any]:
    """A protocol of uvicorn's that closes connections beyond `bounds.CONNECTIONS`, which uvicorn only answers with 503
    once they have sent a request, and those that send none for `bounds.ARRIVAL` seconds, which it keeps."""

    class Bounded(protocol):
        waiting: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            if len(self.connections) > bounds.CONNECTIONS:
                transport.abort()
            self._watch()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._watch()

        def connection_lost(self, exc: Exception | None) -> None:
            super().connection_lost(exc)
            if self.waiting is not None:
                self.waiting.cancel()

        def _idle(self) -> bool:
            # A websocket's connection has a protocol of its own, which pings.
            return self in self.connections and (self.cycle is None or self.cycle.response_complete)

        def _watch(self) -> None:
            if self.waiting is None and self._idle():
                self.waiting = self.loop.call_later(bounds.ARRIVAL, self._close_idle)
            elif self.waiting is not None and not self._idle():
                self.waiting.cancel()
                self.waiting = None

        def _close_idle(self) -> None:
            self.waiting = None
            if self._idle():
                self.transport.close()

    return Bounded


def serve(
    session: Session, listener: socket.socket, host: str, hosts: Iterable[str], ready: Callable[[str], None]
) -> None:
    """Serve the page until interrupted (ctrl-C, or SIGTERM: exits with status 143).

    Args:
        session: handles the requests.
        listener: the listening socket, from `bind`.
        host: the host name in the page's URL.
        hosts: the host names that are answered to, from `host_names`.
        ready: called with the URL once the server accepts requests.
    """
    import uvicorn
    from nicegui import ui
    from uvicorn.protocols.http.auto import AutoHTTPProtocol

    from sgformer.app.page import add_page

    app = build(session)
    add_page(session)
    ui.run_with(app, title="SG-Former", favicon=FAVICON, tailwind=False, show_welcome_message=False)

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            ready(f"http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}")

    config = uvicorn.Config(
        guard(app, hosts),
        http=bounded(AutoHTTPProtocol),
        log_level="error",
        timeout_graceful_shutdown=2,
        ws_max_size=2**20,
    )
    # What visitors send must neither fill the log, with a line for each page that is not there, nor steer a terminal.
    logging.getLogger("nicegui").setLevel(logging.ERROR)
    for name in ("nicegui", "uvicorn.error", "engineio.server", "socketio.server"):
        escape_log(name)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # uvicorn re-raises it after shutting down
    # NiceGUI scans all live objects for its server, and some of torch's warn when inspected.
    warnings.filterwarnings("ignore", category=FutureWarning, module="nicegui")
    with contextlib.suppress(KeyboardInterrupt):
        Server(config).run([listener])


FAVICON = (
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 4 4" shape-rendering="crispEdges">'
    '<rect width="4" height="4" fill="#440154"/><rect x="1" width="2" height="4" fill="#21918c"/>'
    '<rect x="1" y="1" width="2" height="2" fill="#fde725"/></svg>'
)
