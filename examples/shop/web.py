"""HTTP for the order service: REST and one page, on loopback.

    POST /orders        place an order; 201, or 200 when it was placed before, or 409, 413, 415, 422
    GET  /orders/{id}   one order; 404 when there is none
    GET  /orders        tally and newest orders; ?limit=1…500
    GET  /              the page

Invariant: 201 and 200 are sent after the order is on disk; after any other answer, or none, the client
may send the same order again.
Read next: order.py, page.html.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path

import msgspec
import uvicorn
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from examples.shop.clients.settings import SettingError
from examples.shop.order import NewOrder, OtherOrderError, find, overview, place
from examples.shop.orders import SOLD_OUT, STOCK
from trunkline import Running, TrunklineError

HOST = "127.0.0.1"
DEFAULT_PORT = 8000
BODY_LIMIT_BYTES = 16 * 1024
PAGE_LIMIT = 500
# Connections that a browser keeps open do not hold up the stop for longer.
STOP_S = 3

_ITEMS = "".join(f'<option value="{sku}">{sku}{" (none left)" if sku == SOLD_OUT else ""}</option>' for sku in STOCK)
PAGE = Path(__file__).with_name("page.html").read_text("utf-8").replace("<!--items-->", _ITEMS).encode()
_PAGE_HEADERS = {
    "content-security-policy": "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline';"
    " connect-src 'self'; img-src data:; form-action 'none'; base-uri 'none'; frame-ancestors 'none'",
    "cache-control": "no-cache",
}

_encode = msgspec.json.encode
_new_order = msgspec.json.Decoder(NewOrder).decode


class Site:
    """The routes of a running order service; `application` is what a server needs."""

    def __init__(self, running: Running) -> None:
        self._running = running
        self.application = Starlette(
            routes=[
                Route("/", self._page),
                Route("/orders", self._post, methods=["POST"]),
                Route("/orders", self._newest),
                Route("/orders/{order_id}", self._get),
            ],
            # A page elsewhere whose name is made to point at loopback gets nothing.
            middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=[HOST, "localhost"])],
            exception_handlers={TrunklineError: _unavailable},
        )

    async def _post(self, request: Request) -> Response:
        # Only what a page of another origin cannot send without asking first (CORS preflight).
        if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
            return _problem(415, "send the order as content-type: application/json")
        body = await _body(request)
        if body is None:
            return _problem(413, f"an order has at most {BODY_LIMIT_BYTES} bytes")
        try:
            new = _new_order(body)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            return _problem(422, str(error))
        try:
            stored, is_new = await place(self._running, new)
        except OtherOrderError as error:
            return _problem(409, str(error))
        return _json(201 if is_new else 200, stored, {"location": f"/orders/{stored.order_id}"})

    async def _get(self, request: Request) -> Response:
        order_id = request.path_params["order_id"]
        found = await find(self._running, order_id)
        return _problem(404, f"no order {order_id[:80]!r}") if found is None else _json(200, found)

    async def _newest(self, request: Request) -> Response:
        limit = _limit(request.query_params.get("limit", "50"))
        if limit is None:
            return _problem(422, f"limit is {request.query_params['limit'][:20]!r}; allowed: 1 to {PAGE_LIMIT}")
        body = _encode(await overview(self._running, limit))
        tag = f'"{blake2b(body, digest_size=12).hexdigest()}"'
        if request.headers.get("if-none-match") == tag:
            return Response(status_code=304, headers={"etag": tag})
        return Response(body, 200, {"etag": tag, "cache-control": "no-cache"}, "application/json")

    async def _page(self, _request: Request) -> Response:
        return Response(PAGE, 200, _PAGE_HEADERS, "text/html")


async def _unavailable(_request: Request, error: Exception) -> Response:
    return _json(503, {"error": str(error)}, {"retry-after": "1"})


async def serve(running: Running) -> None:
    """Serve until cancelled, then finish the requests under way."""
    listening = socket.create_server((HOST, _port()), backlog=512)
    server = _Server(
        uvicorn.Config(
            Site(running).application,
            lifespan="off",
            ws="none",
            access_log=False,
            server_header=False,
            log_level="warning",
            timeout_keep_alive=75,
            timeout_graceful_shutdown=STOP_S,
        )
    )
    serving = asyncio.ensure_future(server.serve([listening]))
    try:
        await asyncio.shield(serving)
    except asyncio.CancelledError:
        server.should_exit = True
        await serving
        raise


class _Server(uvicorn.Server):
    """uvicorn without its signal handlers: the service is told to stop, not the server."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _port() -> int:
    text = os.environ.get("SHOP_PORT", str(DEFAULT_PORT))
    if not (text.isascii() and text.isdecimal() and int(text) < 65536):  # noqa: PLR2004 - ports have 16 bits
        raise SettingError("SHOP_PORT", f"is {text[:20]!r}; allowed: 0 to 65535")
    return int(text)


def _limit(text: str) -> int | None:
    if not (text.isascii() and text.isdecimal() and len(text) <= len(str(PAGE_LIMIT))):
        return None
    return int(text) if 1 <= int(text) <= PAGE_LIMIT else None


async def _body(request: Request) -> bytes | None:
    body = b""
    async for part in request.stream():
        body += part
        if len(body) > BODY_LIMIT_BYTES:
            return None
    return body


def _json(status: int, content: object, headers: dict[str, str] | None = None) -> Response:
    return Response(_encode(content), status, headers, "application/json")


def _problem(status: int, text: str) -> Response:
    return _json(status, {"error": text})
