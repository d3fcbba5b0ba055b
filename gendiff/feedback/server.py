"""Server of the labelling page: three static files, the samples' pictures, and a route that appends labels.

URLs name samples by content hash instead of a path, so they cannot reach files outside of the samples' folder.  A
request needs the token printed at the start, and on a loopback address a loopback Host header, against DNS rebinding.
The server closes a connection without a complete request within `PATIENCE`.
"""

import asyncio
import hashlib
import hmac
import json
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

try:
    import uvicorn
    from starlette.applications import Starlette
    from starlette.concurrency import run_in_threadpool
    from starlette.datastructures import Headers, MutableHeaders
    from starlette.requests import ClientDisconnect, Request
    from starlette.responses import JSONResponse, PlainTextResponse, RedirectResponse, Response
    from starlette.routing import Route
    from starlette.types import ASGIApp, Message, Receive, Scope, Send
    from uvicorn.protocols.http.h11_impl import H11Protocol
except ModuleNotFoundError as error:
    raise ModuleNotFoundError("the labelling page needs more packages: pip install 'gendiff[feedback]'") from error

from gendiff.feedback import labels, render
from gendiff.feedback.board import Board
from gendiff.feedback.labels import LabelError
from gendiff.feedback.render import Picture
from gendiff.feedback.samples import SampleError

PAGE = Path(__file__).parent / "page"
FILES = {
    "/": ("index.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
}
LARGEST = 2**20
"""Largest request, in bytes."""
PATIENCE = 30.0
"""Largest duration of receiving a request, in seconds."""
LOOPBACK = {"localhost", "127.0.0.1", "::1"}
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
}


class Prompt(H11Protocol):
    """HTTP that closes a connection after `PATIENCE` seconds without a request in progress."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        inner = self.app
        self._timer: asyncio.TimerHandle | None = None

        async def timed(scope: Scope, receive: Receive, send: Send) -> None:
            self._stop()
            try:
                await inner(scope, receive, send)
            finally:
                self._start()

        self.app = timed

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the timer until the first request."""
        super().connection_made(transport)
        self._start()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the timer."""
        self._stop()
        super().connection_lost(exc)

    def _start(self) -> None:
        if not self.transport.is_closing():
            self._timer = asyncio.get_running_loop().call_later(PATIENCE, self.transport.close)

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()


def runner(board: Board, token: str, loopback: bool) -> uvicorn.Server:
    """Return a server for `runner(...).run(sockets=[...])`; it logs no addresses, because they hold the token."""
    page = app(board, token, loopback)
    config = uvicorn.Config(
        page,
        lifespan="off",
        log_level="warning",
        access_log=False,
        server_header=False,
        http=Prompt,
        ws="none",
        proxy_headers=False,
        timeout_graceful_shutdown=2,
    )
    return uvicorn.Server(config)


def app(board: Board, token: str, loopback: bool = True) -> ASGIApp:
    """Return the page of a board as an ASGI application that requires the token."""
    drawing = render.drawing(board.samples, board.up)
    rows = {content: i for i, content in enumerate(board.samples.hashes)}

    def file(request: Request) -> Response:
        name, media = FILES[request.url.path]
        return Response((PAGE / name).read_bytes(), media_type=media, headers={"Cache-Control": "no-cache"})

    def sample(request: Request) -> Response:
        row = rows.get(request.path_params["content"])
        if row is None:
            return _refusal(404, "the address must end with the content hash of a sample, got another")
        return _picture(drawing.draw(row, "whole" in request.query_params))

    def backdrop(request: Request) -> Response:
        return _picture(drawing.backdrop) if drawing.backdrop else _refusal(404, "these samples have no backdrop")

    def state(request: Request) -> Response:
        return JSONResponse(board.about(_who(board, request)))

    def news(request: Request) -> Response:
        return JSONResponse(board.news(_who(board, request), _since(request)))

    async def append(request: Request) -> Response:
        lines = await _json(request)
        await run_in_threadpool(board.add, lines)
        return JSONResponse(await run_in_threadpool(board.news, _who(board, request), _since(request)))

    def finish(request: Request) -> Response:
        board.finished.set()
        return JSONResponse({"finished": True})

    routes = [
        *(Route(path, file) for path in FILES),
        Route("/sample/{content}", sample),
        Route("/backdrop", backdrop),
        Route("/state", state),
        Route("/lines", news),
        Route("/lines", append, methods=["POST"]),
        Route("/finish", finish, methods=["POST"]),
    ]
    handlers: Mapping[Any, Callable[[Request, Exception], Response]] = {
        SampleError: lambda request, error: _refusal(500, str(error)),
        LabelError: lambda request, error: _refusal(409, str(error)),
        ValueError: lambda request, error: _refusal(400, str(error)),
        TimeoutError: lambda request, error: _refusal(408, f"the request must be complete within {PATIENCE:g} s"),
        ClientDisconnect: lambda request, error: _refusal(400, "the request must be complete, got a part"),
        OSError: lambda request, error: _refusal(507, str(error)),
    }
    return guard(Starlette(routes=routes, exception_handlers=handlers), token, loopback)


def guard(inner: ASGIApp, token: str, loopback: bool) -> ASGIApp:
    """Restrict `inner` to requests with the token (cookie or bearer) and without a foreign Host or Origin.

    `/?token=...` exchanges the token for a cookie, so that the address bar does not keep it.
    """
    # A name per server, because browsers share cookies between the ports of a host.
    cookie = "gendiff-" + hashlib.sha256(token.encode()).hexdigest()[:12]

    async def guarded(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            raise RuntimeError(f"the request must be http, got {scope['type']}")
        headers = Headers(scope=scope)
        refusal = _foreign(headers, loopback)
        query = parse_qs(scope["query_string"].decode("latin-1")).get("token", [""])[0]
        answer: ASGIApp = inner
        if refusal:
            answer = _refusal(403, refusal)
        elif scope["path"] == "/" and _equal(query, token):
            answer = RedirectResponse("/", status_code=303)
            answer.set_cookie(cookie, token, httponly=True, samesite="lax", path="/")
        elif not any(_equal(text, token) for text in (_cookie(headers, cookie), _bearer(headers))):
            answer = _refusal(401, "the request must have the token: open the full address printed at the start")
        await answer(scope, receive, _with_headers(send))

    return guarded


def _with_headers(send: Send) -> Callable[[Message], Awaitable[None]]:
    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            for name, value in {"Cache-Control": "no-store", **HEADERS}.items():
                headers.setdefault(name, value)
        await send(message)

    return sending


def _foreign(headers: Headers, loopback: bool) -> str:
    """Return the error of the Host or Origin header, or ""."""
    host, origin = headers.get("host", ""), headers.get("origin")
    if loopback and _name(f"//{host}") not in LOOPBACK:
        return f"Host must be localhost, 127.0.0.1 or [::1], got {host!r}"
    if origin is not None and origin.partition("//")[2] != host:
        return f"Origin must be this page ({host}), got {origin!r}"
    return ""


def _name(address: str) -> str | None:
    try:
        return urlsplit(address).hostname
    except ValueError:
        return None


def _cookie(headers: Headers, name: str) -> str:
    pairs = (pair.strip().partition("=") for pair in headers.get("cookie", "").split(";"))
    return next((value for key, _, value in pairs if key == name), "")


def _bearer(headers: Headers) -> str:
    scheme, _, credentials = headers.get("authorization", "").partition(" ")
    return credentials if scheme.lower() == "bearer" else ""


def _equal(text: str, token: str) -> bool:
    return hmac.compare_digest(text.encode(), token.encode())


def _refusal(status: int, text: str) -> PlainTextResponse:
    return PlainTextResponse(text.encode("utf-8", "backslashreplace"), status)


def _picture(picture: Picture) -> Response:
    # The browser may cache the picture, because its address holds the content's hash.
    return Response(picture.body, media_type=picture.media, headers={"Cache-Control": "private, max-age=3600"})


def _who(board: Board, request: Request) -> str:
    rater = request.query_params.get("rater") or board.rater
    labels.parse(labels.as_json(labels.Meaning("", rater)))  # check now, because a bad name cannot be stored later
    return rater


def _since(request: Request) -> int:
    text = request.query_params.get("since", "0")
    if not text.isascii() or not text.isdigit():
        raise ValueError(f"since must be a number, got {text!r}")
    return int(text)


async def _json(request: Request) -> Any:
    if request.headers.get("content-type", "").partition(";")[0] != "application/json":
        raise ValueError("content-type must be application/json")
    body = bytearray()
    async with asyncio.timeout(PATIENCE):
        async for chunk in request.stream():
            body += chunk
            if len(body) > LARGEST:
                raise ValueError(f"lines must be at most {LARGEST} bytes, got more")
    try:
        return json.loads(body)
    except RecursionError:
        raise ValueError("lines must be a list of objects, got brackets nested too deeply") from None
