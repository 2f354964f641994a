"""HTTP for the stand-ins: one request in, one reply out, over plain ASGI and uvicorn.

Invariant: every request gets one whole reply; an exception in a stand-in becomes a 500 that names
it, never silence.
Never does: routing or checks that belong to one service. Read next: stripe.py.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import signal
import socket
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl

import uvicorn

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator, MutableMapping, Sequence

    Scope = MutableMapping[str, Any]
    Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
    Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
    Asgi = Callable[[Scope, Receive, Send], Awaitable[None]]

log = logging.getLogger(__name__)

BODY_LIMIT_BYTES = 64 * 1024
LOOPBACK = "127.0.0.1"
_JSON = (b"content-type", b"application/json")


@dataclass(frozen=True, slots=True)
class Request:
    """A request whose body has arrived; header names are in lower case."""

    method: str
    path: str
    query: str
    headers: dict[str, str]
    body: str

    def form(self) -> list[tuple[str, str]]:
        """Return the fields of the form-encoded body, or of the query of a GET, in their order."""
        source = self.query if self.method == "GET" else self.body
        return parse_qsl(source, keep_blank_values=True)


@dataclass(frozen=True, slots=True)
class Reply:
    """A JSON answer, its text ready to send."""

    status: int
    body: str
    headers: tuple[tuple[bytes, bytes], ...] = ()


def json_reply(status: int, content: object, *headers: tuple[bytes, bytes]) -> Reply:
    """Return a reply with `content` as JSON."""
    return Reply(status, json.dumps(content, separators=(",", ":")), headers)


def asgi(answer: Callable[[Request], Awaitable[Reply]]) -> Asgi:
    """Return the ASGI application that answers each HTTP request with `answer`."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            message = f"a stand-in speaks HTTP, not {scope['type']}"
            raise RuntimeError(message)
        body = await _body(receive)
        if body is None:
            reply = json_reply(413, {"message": f"body above {BODY_LIMIT_BYTES} bytes"})
        else:
            reply = await _answered(answer, scope, body)
        content = reply.body.encode()
        length = (b"content-length", b"%d" % len(content))
        await send(
            {
                "type": "http.response.start",
                "status": reply.status,
                "headers": [_JSON, length, *reply.headers],
            }
        )
        await send({"type": "http.response.body", "body": content})

    return app


async def _body(receive: Receive) -> bytes | None:
    event = await receive()
    body: bytes = event.get("body", b"")
    while event.get("more_body"):
        if len(body) > BODY_LIMIT_BYTES:
            return None
        event = await receive()
        body += event.get("body", b"")
    return None if len(body) > BODY_LIMIT_BYTES else body


async def _answered(answer: Callable[[Request], Awaitable[Reply]], scope: Scope, body: bytes) -> Reply:
    try:
        request = Request(
            method=scope["method"],
            path=scope["path"],
            query=scope["query_string"].decode("latin-1"),
            headers={k.decode("latin-1"): v.decode("latin-1") for k, v in scope["headers"]},
            body=body.decode(),
        )
    except UnicodeDecodeError as error:
        return json_reply(400, {"message": f"the body is not UTF-8: {error}"})
    try:
        return await answer(request)
    except Exception as error:
        log.exception("%s %s failed", request.method, request.path)
        return json_reply(500, {"message": f"the stand-in failed: {error!r}"})


class _Site(uvicorn.Server):
    """uvicorn's server without its signal handlers: several share one process."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class HttpSite:
    """One HTTP stand-in that listens on loopback."""

    def __init__(self, answer: Callable[[Request], Awaitable[Reply]], port: int) -> None:
        """Bind the port; 0 lets the system choose one."""
        self._socket = socket.create_server((LOOPBACK, port), backlog=512)
        self.url = f"http://{LOOPBACK}:{self._socket.getsockname()[1]}"
        # The stand-ins share two cores with the shop: no access log, no extra headers; the C parser
        # (httptools) when it is installed: 0.12 ms less for each request than h11.
        config = uvicorn.Config(
            asgi(answer),
            http="auto",
            loop="uvloop",
            lifespan="off",
            ws="none",
            access_log=False,
            server_header=False,
            date_header=False,
            log_level="warning",
            timeout_keep_alive=300,
        )
        self._server = _Site(config)

    async def serve(self, stop: asyncio.Event) -> None:
        """Answer requests until `stop` is set and the running ones are answered."""
        serving = asyncio.ensure_future(self._server.serve([self._socket]))
        stopping = asyncio.ensure_future(stop.wait())
        await asyncio.wait([serving, stopping], return_when=asyncio.FIRST_COMPLETED)
        self._server.should_exit = True
        stopping.cancel()
        await serving


def stop_event() -> asyncio.Event:
    """Return an event that SIGTERM and SIGINT set."""
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    return stop


def run_alone(
    answer_for: Callable[[argparse.Namespace], Callable[[Request], Awaitable[Reply]]],
    options: argparse.Namespace,
) -> None:
    """Serve one HTTP stand-in until a signal; print where it listens."""

    async def main() -> None:
        stop = stop_event()
        site = HttpSite(answer_for(options), options.port)
        say(f"listening on {site.url}")
        await site.serve(stop)

    run(main)


def run(main: Callable[[], Awaitable[None]]) -> None:
    """Run `main` on uvloop."""
    import uvloop

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_as_coroutine(main))


async def _as_coroutine(main: Callable[[], Awaitable[None]]) -> None:
    await main()


def say(line: str) -> None:
    """Print a line that the starter waits for."""
    print(line, flush=True)  # noqa: T201 - the command's output


def arguments(doc: str, *, database: str, more: Sequence[tuple[str, float, str]] = ()) -> argparse.Namespace:
    """Read the command line of one stand-in.

    Args:
        doc: module docstring; its first line is the help's heading.
        database: file used when none is given.
        more: further number options as (name, default, help).
    """
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--port", type=int, default=0, help="0 lets the system choose (default)")
    parser.add_argument("--database", default=database, help="file of the ledger (%(default)s)")
    for name, default, text in more:
        parser.add_argument(name, type=float, default=default, help=text)
    return parser.parse_args()
