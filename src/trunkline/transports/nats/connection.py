"""One connection to NATS: dialled, asked, written to once per tick of the loop.

Invariant: a password is never sent in plain where TLS was asked for; what waits for an answer when the connection
is lost is told at once. Never does: streams and consumers (layout.py). Read next: layout.py.
"""

from __future__ import annotations

import asyncio
import logging
import re
import ssl
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import msgspec
from nats import errors
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription

from trunkline.clock import Clock
from trunkline.errors import ConfigurationError, TransportError, TrunklineError
from trunkline.link import Link, Options
from trunkline.transport import Address
from trunkline.wire import header_text

log = logging.getLogger("trunkline.transport.nats")

PORT = 4222
DIAL_S = 5.0
"""Longest wait for one server to answer."""
ASK_S = 5.0
"""Longest wait for an answer of the JetStream API."""
LEAVE_S = 2.0
"""Longest wait for what was written last to reach the server."""
PING_S = 5
"""A connection that is silent for three of these is taken for lost."""

Sink = Callable[[bytes, bytes, bytes, bytes | None], None]
"""Takes subject, reply subject, body and raw headers of one message."""


class ApiError(TransportError):
    """JetStream refused a request. `err_code` is one of nats-server's errors.json."""


class Wire(Client):
    """nats-py's client, which hands messages to a sink where they are read.

    Its own way, a queue and a task per subscription and headers parsed for each message, took 5 of 9 µs.
    """

    def __init__(self, *, secure: bool) -> None:
        super().__init__()
        self.sinks: dict[int, Sink] = {}
        self._secure = secure

    async def _process_msg(self, sid: int, subject: bytes, reply: bytes, data: bytes, headers: bytes) -> None:
        sink = self.sinks.get(sid)
        if sink is None:
            await super()._process_msg(sid, subject, reply, data, headers)
        else:
            sink(subject, reply, data, headers)

    async def _process_info(self, info: dict[str, Any], initial_connection: bool = False) -> None:  # noqa: FBT001, FBT002 - as nats-py
        if initial_connection:
            offered = info.get("tls_required") or info.get("tls_available")
            if self._secure and not offered:
                raise ConfigurationError("E245", "the server speaks no TLS", "write nats:// if that is meant")
            if not self._secure and info.get("tls_required"):
                raise ConfigurationError("E245", "the server takes TLS only", "write tls://")
            if self._secure:
                info["tls_required"] = True  # else nats-py would go on in plain where the server lets it
        await super()._process_info(info, initial_connection)

    def _connect_command(self) -> bytes:
        writer = getattr(self._transport, "_io_writer", None)
        if self._secure and writer is not None:
            # nats-py leaves this out, and asyncio warns of it whenever a TLS connection ends.
            writer.transport.get_protocol()._over_ssl = True  # noqa: SLF001
        return super()._connect_command()

    def send_raw(self, commands: list[bytes]) -> None:
        """Write protocol lines."""
        if self._transport is not None and self.is_connected:
            self._transport.writelines(commands)

    async def _process_op_err(self, e: Exception) -> None:
        self.abort()
        await super()._process_op_err(e)

    def abort(self) -> None:
        """Drop the connection with what is not written.

        nats-py closes and waits: for minutes where the other side is silent, for ever after a failed TLS handshake.
        """
        writer = getattr(self._transport, "_io_writer", None)
        if writer is not None:
            writer.transport.abort()

    async def leave(self) -> None:
        """Close in order, but not for long."""
        try:
            async with asyncio.timeout(LEAVE_S):
                await self.flush()
        except (errors.Error, TimeoutError, OSError) as error:
            log.debug("not flushed: %s", error)
            self.abort()
        await self.close()

    async def end(self, subscription: Subscription) -> None:
        """Ask for no more of `subscription`, see what was on its way, then forget it."""
        await subscription.drain()  # type: ignore[no-untyped-call]
        self.sinks.pop(subscription._id, None)  # noqa: SLF001 - as in `subscribe`


class Connection:
    """Keeps one connection up and carries requests over it.

    Args:
        established: makes again what a new connection needs; called before anybody may use it.
        lost: told when the connection is gone.
        denied: told the subject that the user may not publish to; returns whether somebody was waiting for that.
    """

    def __init__(
        self,
        address: Address,
        options: Options,
        clock: Clock,
        *,
        established: Callable[[], Awaitable[None]],
        lost: Callable[[], None],
        denied: Callable[[str, ConfigurationError], None],
    ) -> None:
        self.shown = address.shown
        self.link = Link(address.shown, clock, self._connect)
        self.inbox = f"_INBOX.{clock.new_id().replace('-', '')}"
        self._address = address
        self._clock = clock
        self._established = established
        self._lost = lost
        self._denied = denied
        domain = options.text("domain")
        self.api = f"$JS.{domain}.API" if domain else "$JS.API"
        self._credentials = options.text("credentials")
        self._tls = _tls_context(address, options)
        self._wire: Wire | None = None
        self._out: list[bytes] = []
        self._asked: dict[int, tuple[asyncio.Future[list[_Answer]], list[_Answer] | None, str]] = {}
        self._tokens = 0
        self._problem: BaseException | None = None
        self._loop: asyncio.AbstractEventLoop

    @property
    def max_payload(self) -> int:
        """Return the largest message that the server takes, in bytes."""
        return self._wire.max_payload if self._wire is not None else 1024 * 1024

    @property
    def info(self) -> Mapping[str, Any]:
        """Return what the server says of itself."""
        return self._wire._server_info if self._wire is not None else {}  # noqa: SLF001 - nats-py has no way to it

    # --- connecting ---

    async def connect_once(self) -> None:
        """Connect without trying again, to look around.

        Raises: ConfigurationError E244 or E245; TransportError if no server answers.
        """
        await self._connect()

    async def _connect(self) -> None:
        self._loop = asyncio.get_running_loop()
        wire = await self._dial()
        self._wire = wire
        self._out.clear()
        try:
            await self.subscribe(f"{self.inbox}.ask.*", self._answer)
            await self._established()
        except BaseException:
            self._wire = None
            wire.abort()
            await wire.close()
            raise

    async def _dial(self) -> Wire:
        """Connect to the first server that answers.

        Raises: ConfigurationError E244 or E245 if one refuses; TransportError if none answers.
        """
        hosts = list(self._address.hosts) or [("127.0.0.1", None)]
        start = int(self._clock.random() * len(hosts))
        failure: TrunklineError | None = None
        for name, port in hosts[start:] + hosts[:start]:
            try:
                return await self._dial_one(name, port or PORT)
            except TransportError as error:
                failure = error
        assert failure is not None  # noqa: S101 - there was at least one host
        raise failure

    async def _dial_one(self, name: str, port: int) -> Wire:
        wire = Wire(secure=self._tls is not None)
        seen: list[BaseException] = []

        async def problem(error: Exception) -> None:
            seen.append(error)
            self._note(error)

        async def closed() -> None:
            if self._wire is wire:
                self._gone(seen[-1] if seen else None)

        host = f"[{name}]" if ":" in name else name
        try:
            await wire.connect(
                f"nats://{host}:{port}", error_cb=problem, closed_cb=closed, allow_reconnect=False,
                max_reconnect_attempts=1, reconnect_time_wait=0, connect_timeout=DIAL_S,  # type: ignore[arg-type]
                ping_interval=PING_S, max_outstanding_pings=2, name="trunkline", tls=self._tls,
                tls_hostname=name if self._tls is not None else None, inbox_prefix=self.inbox,
                **self._sign_in(),
            )  # fmt: skip
        except ConfigurationError as error:
            wire.abort()
            raise ConfigurationError(error.code, f"{self.shown}: {error.message}", error.hint) from None
        except ModuleNotFoundError as error:
            wire.abort()
            raise ConfigurationError(
                "E242", f"{self.shown} with credentials needs {error.name}, which is not installed",
                "pip install 'nats-py[nkeys]'",
            ) from error  # fmt: skip
        except (OSError, errors.Error, TimeoutError, ValueError) as error:
            wire.abort()
            raise self._refusal(seen[-1] if isinstance(error, errors.NoServersError) and seen else error) from error
        except BaseException:
            wire.abort()
            raise
        return wire

    def _sign_in(self) -> dict[str, Any]:
        user, password = self._address.user, self._address.password
        if self._credentials is not None:
            return {"user_credentials": self._credentials}
        if user is not None and password is None:
            return {"token": user}
        return {"user": user, "password": password}

    def _refusal(self, error: BaseException) -> TrunklineError:
        text = str(error).removeprefix("nats: ").strip("'")
        if isinstance(error, ssl.SSLError):
            return ConfigurationError(
                "E245", f"{self.shown}: TLS failed: {error}", "check the certificate, its name, and the option ca"
            )
        if "authorization" in text.lower() or "authentication" in text.lower():
            who = "without a user" if self._address.user is None else f"user {self._address.user!r}"
            if self._address.user is not None and self._address.password is None:
                who = "the token"
            return ConfigurationError(
                "E244", f"{self.shown} refuses {who}: {text}", "check user and password in the URL"
            )
        return TransportError("E520", text or type(error).__name__)

    def _note(self, error: Exception) -> None:
        """React to what the server tells outside of any answer."""
        self._problem = error
        found = re.search(r'permissions violation for (publish|subscription) to "([^"]+)"', str(error), re.IGNORECASE)
        if found is None:
            log.debug("%s: %s", self.shown, error)
            return
        verb, subject = found.groups()
        refusal = ConfigurationError(
            "E246", f"{self.shown}: the user may not {verb[:9].lower()} {'to ' * (verb[0] in 'pP')}{subject}",
            "give the user this permission",
        )  # fmt: skip
        log.error("%s", refusal)
        for token, (future, _, asked) in list(self._asked.items()):
            if (asked.lower() == subject or verb[0] in "sS") and not future.done():
                future.set_exception(refusal)
                del self._asked[token]
        self._denied(subject, refusal)

    def _gone(self, error: BaseException | None) -> None:
        self._wire = None
        for future, _, _ in self._asked.values():
            if not future.done():
                future.set_exception(self._down())
        self._asked.clear()
        self._lost()
        self.link.lost(error)

    def _down(self) -> TransportError:
        return TransportError(
            "E520", f"{self.shown}: the connection was lost", "a running service makes it anew; try again"
        )

    async def close(self) -> None:
        """Send what is written, then disconnect."""
        await self.link.stop()
        wire, self._wire = self._wire, None
        if wire is not None:
            wire.send_raw(self._out)
            await wire.leave()

    # --- writing and asking ---

    def post(self, command: bytes) -> None:
        """Write protocol lines at the end of this tick; without a connection they are dropped."""
        if self._wire is not None:
            if not self._out:
                self._loop.call_soon(self._flush)
            self._out.append(command)

    def _flush(self) -> None:
        out, self._out = self._out, []
        if self._wire is not None:
            self._wire.send_raw(out)

    async def subscribe(self, subject: str, sink: Sink) -> Subscription:
        """Hand what comes to `subject` to `sink`."""
        wire = self._wire
        if wire is None:
            raise self._down()

        async def forward(message: Msg) -> None:
            sink(message.subject.encode(), message.reply.encode(), message.data, _raw_headers(message.headers))

        try:
            subscription = await wire.subscribe(subject, cb=forward)
        except (errors.Error, OSError) as error:
            raise self._down() from error
        wire.sinks[subscription._id] = sink  # noqa: SLF001 - the number that comes with each message
        return subscription

    async def unsubscribe(self, subscription: Subscription) -> None:
        """Ask for no more; what was on its way still comes before this ends."""
        wire = self._wire
        if wire is None:
            return
        try:
            async with asyncio.timeout(ASK_S):
                await wire.end(subscription)
        except (errors.Error, OSError, TimeoutError) as error:
            log.debug("%s: not unsubscribed: %s", self.shown, error)

    async def ask(self, verb: str, body: object = None) -> dict[str, Any]:
        """Ask the JetStream API.

        Raises: ApiError if it refuses; ConfigurationError E246; TransportError if there is no answer.
        """
        ((_, data, headers),) = await self._request(f"{self.api}.{verb}", body, many=False)
        if headers is not None and headers.startswith(b"NATS/1.0 503"):
            raise ApiError("E522", f"{self.shown}: nobody answers {verb}", "check JetStream", err_code=503)
        return self._checked(verb, data)

    async def ask_many(self, verb: str, body: object) -> list[tuple[bytes, Mapping[str, str]]]:
        """Ask for several messages; return the body and headers of each."""
        answers = await self._request(f"{self.api}.{verb}", body, many=True)
        return [(data, parse_headers(headers)) for _, data, headers in answers]

    async def inquire(self, subject: str) -> tuple[bytes, bytes | None]:
        """Ask something else than the JetStream API; return the body and headers of the first answer.

        Raises: ConfigurationError E246; TransportError if there is no answer.
        """
        ((_, data, headers),) = await self._request(subject, None, many=False)
        return data, headers

    async def write(self, subject: str, headers: bytes, body: bytes) -> int:
        """Publish one message to a stream, once; return its sequence.

        Raises: ApiError if the stream refuses it, such as for its last sequence; TransportError if there is no answer.
        """
        ((_, data, status),) = await self._request(subject, body, many=False, headers=headers)
        if status is not None and status.startswith(b"NATS/1.0 503"):
            raise ApiError("E522", f"{self.shown}: nobody keeps {subject}", "check JetStream", err_code=503)
        return int(self._checked(subject, data)["seq"])

    def _checked(self, verb: str, data: bytes) -> dict[str, Any]:
        answer: dict[str, Any] = msgspec.json.decode(data)
        error = answer.get("error")
        if error is not None:
            raise ApiError(
                "E522", f"{self.shown} refuses {verb}: {error.get('description')}", "see the server's log",
                err_code=error.get("err_code", 0),
            )  # fmt: skip
        return answer

    async def _request(self, subject: str, body: object, *, many: bool, headers: bytes = b"") -> list[_Answer]:
        if self._wire is None:
            raise self._down()
        future: asyncio.Future[list[_Answer]] = self._loop.create_future()
        self._tokens = token = self._tokens + 1
        self._asked[token] = (future, [] if many else None, subject)
        data = body if isinstance(body, bytes) else b"" if body is None else msgspec.json.encode(body)
        self.post(command(subject.encode(), f"{self.inbox}.ask.{token}".encode(), data, headers))
        try:
            async with asyncio.timeout(ASK_S):
                return await future
        except TimeoutError:
            raise TransportError(
                "E521", f"{self.shown} did not answer {subject} within {ASK_S:g} s", "see the server's log"
            ) from None
        finally:
            self._asked.pop(token, None)

    def _answer(self, subject: bytes, reply: bytes, data: bytes, headers: bytes | None) -> None:  # noqa: ARG002
        found = self._asked.get(int(subject.rpartition(b".")[2]))
        if found is None or found[0].done():
            return
        future, collected, _ = found
        answer = (subject, data, headers)
        if collected is None:
            future.set_result([answer])
        elif headers is not None and headers[:12] in {b"NATS/1.0 204", b"NATS/1.0 404"}:
            future.set_result(collected)
        else:
            collected.append(answer)


_Answer = tuple[bytes, bytes, bytes | None]


def command(subject: bytes, reply: bytes, body: bytes, headers: bytes = b"") -> bytes:
    """Return the protocol lines that publish one message.

    Args:
        headers: their lines, each with its end of line; none for no headers.
    Source: NATS client protocol, PUB and HPUB.
    """
    if not headers:
        return b"PUB %b %b %d\r\n%b\r\n" % (subject, reply, len(body), body)
    size = len(headers) + 12
    return b"HPUB %b %b %d %d\r\nNATS/1.0\r\n%b\r\n%b\r\n" % (subject, reply, size, size + len(body), headers, body)


def parse_headers(raw: bytes | None) -> dict[str, str]:
    """Return headers by name; what is no UTF-8 is escaped, for wire.py to refuse."""
    if raw is None:
        return {}
    found = {}
    for line in raw.split(b"\r\n")[1:]:
        name, colon, value = line.partition(b":")
        if colon:
            found[header_text(name.strip())] = header_text(value.strip())
    return found


def _raw_headers(headers: Mapping[str, str] | None) -> bytes | None:
    """Write headers as they were read; see `parse_headers`."""
    if not headers:
        return None
    rest = dict(headers)
    status = " ".join(filter(None, (rest.pop("Status", ""), rest.pop("Description", ""))))
    lines = [f"NATS/1.0 {status}".rstrip(), *(f"{name}: {value}" for name, value in rest.items()), "", ""]
    return "\r\n".join(lines).encode("utf-8", "surrogateescape")


def _tls_context(address: Address, options: Options) -> ssl.SSLContext | None:
    ca, cert, key = options.text("ca"), options.text("cert"), options.text("key")
    if address.scheme != "tls":
        if ca or cert or key:
            raise ConfigurationError(
                "E241", f"ca, cert and key in the URL of {address.shown} are for TLS", "write tls:// for nats://"
            )
        return None
    try:
        context = ssl.create_default_context(cafile=ca)
        if cert is not None:
            context.load_cert_chain(cert, key)
    except (OSError, ssl.SSLError) as error:
        raise ConfigurationError(
            "E245", f"{address.shown}: {ca or ''} {cert or ''} cannot be used: {error}", "name PEM files"
        ) from error
    return context
