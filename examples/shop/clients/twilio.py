"""SMS through Twilio's own library, and never the same one twice.

Twilio has no idempotency keys, so the text itself carries a reference, and an attempt that may
follow a sent one asks Twilio's list of messages for it first. What remains open is an earlier
attempt whose request is still under way while the later one asks: `send` gives up after TIMEOUT_S;
keep that below the lease of the message, and the earlier attempt ends before the next begins.
Invariant: `send` with `may_have_been_sent=True` sends only when the list holds no text with the
reference.
Read next: settings.py.
"""

from __future__ import annotations

import asyncio
import base64
import logging
import os
from datetime import timedelta
from typing import TYPE_CHECKING

from twilio.auth_strategy.auth_strategy import AuthStrategy  # type: ignore[import-untyped]
from twilio.auth_strategy.auth_type import AuthType  # type: ignore[import-untyped]
from twilio.credential.credential_provider import CredentialProvider  # type: ignore[import-untyped]
from twilio.http.async_http_client import AsyncTwilioHttpClient  # type: ignore[import-untyped]
from twilio.rest import Client  # type: ignore[import-untyped]

from examples.shop.clients.settings import required

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from datetime import datetime

TIMEOUT_S = 10.0
PAGE_SIZE = 50
CLOCK_MARGIN = timedelta(days=1)
"""How far the clocks of the shop's machines and of Twilio may be apart: a time zone set wrongly is many hours."""


class _Basic(CredentialProvider, AuthStrategy):  # type: ignore[misc]
    """Basic authentication as a header made once.

    The library's own way goes through aiohttp's `BasicAuth`, which is deprecated and warns at each
    request.
    """

    def __init__(self, user: str, password: str) -> None:
        super().__init__(AuthType.BASIC)
        self._header = f"Basic {base64.b64encode(f'{user}:{password}'.encode()).decode()}"

    def to_auth_strategy(self) -> _Basic:
        return self

    def get_auth_string(self) -> str:
        return self._header

    def requires_authentication(self) -> bool:
        return True


class Sms:
    """Twilio as the notification service sees it."""

    def __init__(
        self,
        account_sid: str,
        auth_token: str,
        sender: str,
        api_base: str | None = None,
        *,
        timeout_s: float = TIMEOUT_S,
    ) -> None:
        """Make the client; needs a running event loop.

        Args:
            account_sid: `AC` and 32 hex digits.
            auth_token: of the account.
            sender: one of the account's numbers, E.164.
            api_base: another address than Twilio's own, for a stand-in.
            timeout_s: longest time one `send` may take.
        """
        # Eight lines for each request otherwise.
        logging.getLogger("twilio.async_http_client").setLevel(logging.WARNING)
        self._http = AsyncTwilioHttpClient()
        self._client = Client(
            account_sid=account_sid,
            http_client=self._http,
            credential_provider=_Basic(account_sid, auth_token),
        )
        if api_base:
            self._client.api.base_url = api_base
        self._sender = sender
        self._timeout_s = timeout_s

    async def send(self, *, to: str, text: str, reference: str, since: datetime, may_have_been_sent: bool) -> str:
        """Send one SMS and return its sid; the earlier sid when it was sent before.

        Args:
            to: E.164.
            text: without the reference.
            reference: short, unique for this SMS among those to `to`; put behind the text in
                brackets.
            since: when the message that asks for this SMS was made; older texts are not looked at.
                With a time zone.
            may_have_been_sent: whether an earlier attempt may have come as far as Twilio; True
                costs a second request.

        Raises:
            TimeoutError: no answer in time; it may have been sent.
            twilio.base.exceptions.TwilioException: refused, with Twilio's code.
        """
        # The library's asynchronous client takes a timeout but never uses it.
        async with asyncio.timeout(self._timeout_s):
            if may_have_been_sent:
                sid = await self._sent(to, reference, since)
                if sid is not None:
                    return sid
            message = await self._client.messages.create_async(to=to, from_=self._sender, body=f"{text} [{reference}]")
            return str(message.sid)

    async def _sent(self, to: str, reference: str, since: datetime) -> str | None:
        # Not filtered by date_sent: a message still in Twilio's queue has none yet and would be
        # missed.
        listed = await self._client.messages.stream_async(to=to, page_size=PAGE_SIZE)
        oldest = since - CLOCK_MARGIN
        async for message in listed:
            if message.date_created is not None and message.date_created < oldest:
                return None
            if (message.body or "").endswith(f"[{reference}]"):
                return str(message.sid)
        return None

    async def close(self) -> None:
        """Close the connections."""
        await self._http.close()


async def open_sms() -> AsyncIterator[Sms]:
    """Provide `Sms` from TWILIO_ACCOUNT_SID, _AUTH_TOKEN, _FROM and, for a stand-in, _API_BASE."""
    sms = Sms(
        required("TWILIO_ACCOUNT_SID", "the account, 'AC' and 32 hex digits"),
        required("TWILIO_AUTH_TOKEN", "the account's token"),
        required("TWILIO_FROM", "the sending number, '+15005550006' for instance"),
        os.environ.get("TWILIO_API_BASE"),
    )
    try:
        yield sms
    finally:
        await sms.close()
