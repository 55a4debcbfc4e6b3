"""The page's HTTP server: uploads in, results out, behind a request guard."""

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


# Starlette's TrustedHostMiddleware covers the Host check alone, and rejects bracketed IPv6 hosts ([::1]:7860).
class Guard:
    """ASGI middleware: rejects cross-site requests and oversized bodies, and adds security headers.

    Args:
        app: the guarded ASGI application.
        hosts: allowed Host names, without ports; None: any. This also rejects DNS rebinding, where another site's name
            resolves to this server.
    """

    def __init__(self, app: Any, hosts: frozenset[str] | None):
        self.app, self.hosts = app, hosts

    async def __call__(self, scope: Message, receive: Callable[[], Awaitable[Message]], send: Any) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        if not self._same_site(headers.get("host", ""), headers.get("origin")):
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1008})
            else:
                await JSONResponse({"error": "cross-site request"}, 403)(scope, receive, send)  # type: ignore[arg-type]
            return
        if scope["type"] == "websocket":
            await self.app(scope, receive, send)
            return
        length = headers.get("content-length", "0")
        if not length.isdigit() or int(length) > bounds.MAX_BYTES:
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

    def _same_site(self, host: str, origin: str | None) -> bool:
        """Whether Host is one of this server's names and Origin, if sent, is the same host and port."""
        try:
            known = self.hosts is None or urlsplit(f"//{host}").hostname in self.hosts
            return known and (origin is None or urlsplit(origin).netloc == host)
        except ValueError:
            return False


def body_too_large() -> JSONResponse:
    """413, and the connection is closed without reading the body."""
    return JSONResponse({"error": TOO_LARGE}, 413, {"connection": "close"})


def unavailable(error: Busy | Stopped) -> HTTPException:
    """503 if a retry may succeed, 504 if the same request would be stopped again."""
    return HTTPException(504 if isinstance(error, Stopped) else 503, str(error))


async def read_body(request: Request) -> bytes:
    """Read the body of a request into memory.

    Raises:
        HTTPException: the body is too large (413) or arrives too slowly (408).
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
    return body.getvalue()


def build(session: Session) -> FastAPI:
    """Build the application: `POST /explain` takes the bytes of an image, `/results/ID/` serves its pictures."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)  # FastAPI's own pages load third-party scripts
    thumbnails = []
    for picture in session.examples:
        small = picture.copy()
        small.thumbnail((192, 192))
        thumbnails.append(_jpeg(small))

    @app.exception_handler(HTTPException)
    async def to_json(_: Request, error: HTTPException) -> JSONResponse:
        return JSONResponse({"error": error.detail}, error.status_code)

    def find(id: str) -> Result:
        try:
            return session.find(id)
        except KeyError:
            raise HTTPException(404, "This result has expired. Please upload the image again.") from None

    @app.post("/explain")
    async def explain(request: Request, network: str | None = None, tokens: float = 1.0) -> dict[str, Any]:
        data = await read_body(request)
        try:
            result = await session.explain(data, network, tokens)
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
        return JSONResponse(find(id).tokens(block), headers=KEEP)

    @app.get("/results/{id}/{kind}/{block}.png")
    def layer(id: str, kind: str, block: str) -> Response:
        try:
            return as_png(find(id).map(kind, block))
        except KeyError:
            raise HTTPException(404, f"Block {block} has no map {kind}.") from None

    @app.get("/examples/{number}.jpg")
    def example(number: int) -> Response:
        if not 0 <= number < len(thumbnails):
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
    except (OSError, OverflowError) as error:
        hint = "; pass another --port" if getattr(error, "errno", None) == errno.EADDRINUSE else ""
        why = getattr(error, "strerror", None) or error
        raise UserError(f"cannot listen on {host}, port {port}: {why}{hint}") from None
    return listener


def serve(session: Session, listener: socket.socket, host: str, ready: Callable[[str], None]) -> None:
    """Serve the page until interrupted (ctrl-C, or SIGTERM: exits with status 143).

    Args:
        session: handles the requests.
        listener: the listening socket, from `bind`.
        host: the host name in the page's URL.
        ready: called with the URL once the server accepts requests.
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
