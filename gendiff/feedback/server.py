"""The labelling page's server: three static files, the samples' pictures, and one way to add lines to the labels.

No URL holds a path: samples are asked for by content hash, so nothing outside their folder can be named.  Every request
needs the token that was printed at the start, and on a loopback address a loopback Host header (against DNS rebinding).
Connections whose request does not come whole within `PATIENCE` are closed.
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
"""Bytes of a request."""
PATIENCE = 30.0
"""Seconds that a request may take to come whole."""
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
    """HTTP that closes a connection which is open for `PATIENCE` without a request at work."""

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
        """Wait for the first request."""
        super().connection_made(transport)
        self._start()

    def connection_lost(self, exc: Exception | None) -> None:
        """Wait no longer."""
        self._stop()
        super().connection_lost(exc)

    def _start(self) -> None:
        if not self.transport.is_closing():
            self._timer = asyncio.get_running_loop().call_later(PATIENCE, self.transport.close)

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()


def runner(board: Board, token: str, loopback: bool) -> uvicorn.Server:
    """A server for `runner(...).run(sockets=[...])`; it logs no addresses, since they hold the token."""
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
    """The page of a board as an ASGI application, for who knows the token."""
    drawing = render.drawing(board.samples, board.up)
    rows = {content: i for i, content in enumerate(board.samples.hashes)}

    def file(request: Request) -> Response:
        name, media = FILES[request.url.path]
        return Response((PAGE / name).read_bytes(), media_type=media, headers={"Cache-Control": "no-cache"})

    def sample(request: Request) -> Response:
        row = rows.get(request.path_params["content"])
        if row is None:
            return _refusal(404, "expected the content hash of a sample, given another")
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
        TimeoutError: lambda request, error: _refusal(408, f"the request must come whole within {PATIENCE:g} s"),
        ClientDisconnect: lambda request, error: _refusal(400, "the request must come whole, got a part"),
        OSError: lambda request, error: _refusal(507, str(error)),
    }
    return guard(Starlette(routes=routes, exception_handlers=handlers), token, loopback)


def guard(inner: ASGIApp, token: str, loopback: bool) -> ASGIApp:
    """`inner` for requests with the token (as a cookie or a bearer's) and without a foreign Host or Origin.

    `/?token=...` exchanges the token for a cookie, so that it does not stay in the address bar.
    """
    cookie = "gendiff-" + hashlib.sha256(token.encode()).hexdigest()[:12]  # of this server: cookies know no ports

    async def guarded(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            raise RuntimeError(f"expected an http request, given {scope['type']}")
        headers = Headers(scope=scope)
        refusal = _foreign(headers, loopback)
        given = parse_qs(scope["query_string"].decode("latin-1")).get("token", [""])[0]
        answer: ASGIApp = inner
        if refusal:
            answer = _refusal(403, refusal)
        elif scope["path"] == "/" and _equal(given, token):
            answer = RedirectResponse("/", status_code=303)
            answer.set_cookie(cookie, token, httponly=True, samesite="lax", path="/")
        elif not any(_equal(each, token) for each in (_cookie(headers, cookie), _bearer(headers))):
            answer = _refusal(401, "expected the token: open the whole address that was printed when the page started")
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
    """What is wrong with the Host or Origin header, "" if nothing."""
    host, origin = headers.get("host", ""), headers.get("origin")
    if loopback and _name(f"//{host}") not in LOOPBACK:
        return f"Host: expected localhost, 127.0.0.1 or [::1], given {host!r}"
    if origin is not None and origin.partition("//")[2] != host:
        return f"Origin: expected this page ({host}), given {origin!r}"
    return ""


def _name(address: str) -> str | None:
    try:
        return urlsplit(address).hostname
    except ValueError:
        return None


def _cookie(headers: Headers, name: str) -> str:
    pairs = (each.strip().partition("=") for each in headers.get("cookie", "").split(";"))
    return next((value for key, _, value in pairs if key == name), "")


def _bearer(headers: Headers) -> str:
    scheme, _, given = headers.get("authorization", "").partition(" ")
    return given if scheme.lower() == "bearer" else ""


def _equal(given: str, token: str) -> bool:
    return hmac.compare_digest(given.encode(), token.encode())


def _refusal(status: int, text: str) -> PlainTextResponse:
    return PlainTextResponse(text.encode("utf-8", "backslashreplace"), status)


def _picture(picture: Picture) -> Response:
    # The address holds the content's hash, so the browser may keep it.
    return Response(picture.body, media_type=picture.media, headers={"Cache-Control": "private, max-age=3600"})


def _who(board: Board, request: Request) -> str:
    rater = request.query_params.get("rater") or board.rater
    labels.parse(labels.as_json(labels.Meaning("", rater)))  # before marks are made that cannot be stored
    return rater


def _since(request: Request) -> int:
    given = request.query_params.get("since", "0")
    if not given.isascii() or not given.isdigit():
        raise ValueError(f"since: expected a number, given {given!r}")
    return int(given)


async def _json(request: Request) -> Any:
    if request.headers.get("content-type", "").partition(";")[0] != "application/json":
        raise ValueError("expected application/json")
    body = bytearray()
    async with asyncio.timeout(PATIENCE):
        async for chunk in request.stream():
            body += chunk
            if len(body) > LARGEST:
                raise ValueError(f"expected at most {LARGEST} bytes, given more")
    try:
        return json.loads(body)
    except RecursionError:
        raise ValueError("lines must be a list of objects, got brackets nested too deeply") from None
