"""E-mail through aiosmtplib, on a few connections that stay open.

Invariant: the Message-ID follows from the id of the message that asks for the mail. When the
connection breaks after the text was handed over, nobody can know whether the server took it; it is
sent again with the same Message-ID, and mail systems that suppress duplicates show it once.
Read next: settings.py.
"""

from __future__ import annotations

import asyncio
from email.mime.text import MIMEText
from email.utils import formatdate
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

import aiosmtplib

from examples.shop.clients.settings import SettingError, required

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

TIMEOUT_S = 10.0
CONNECTIONS = 4
"""A mail takes four round trips, one after the other, so one connection is soon the narrowest place."""


class Mail:
    """The mail server as the notification service sees it."""

    def __init__(self, url: str, sender: str) -> None:
        """Make the client; the first mail connects.

        Args:
            url: `smtp://host:port` (STARTTLS when the server offers it) or
                `smtps://user:password@host:port`.
            sender: address in From.

        Raises:
            SettingError: the URL is none of these.
        """
        parts = urlsplit(url)
        if parts.scheme not in {"smtp", "smtps"} or not parts.hostname:
            # Scheme and host only: the URL may hold a password.
            raise SettingError(
                "SMTP_URL",
                f"is '{parts.scheme}://...{parts.hostname or ''}'; "
                "allowed: smtp://host:port or smtps://user:password@host:port",
            )
        self._sender = sender
        self._domain = sender.rpartition("@")[2]
        # Last in, first out: with little to send only one connection is ever opened.
        self._idle: asyncio.LifoQueue[aiosmtplib.SMTP] = asyncio.LifoQueue()
        self._all = [
            aiosmtplib.SMTP(
                hostname=parts.hostname,
                port=parts.port,
                username=unquote(parts.username) if parts.username else None,
                password=unquote(parts.password) if parts.password else None,
                use_tls=parts.scheme == "smtps",
                timeout=TIMEOUT_S,
            )
            for _ in range(CONNECTIONS)
        ]
        for smtp in self._all:
            self._idle.put_nowait(smtp)

    async def send(self, *, message_id: str, to: str, subject: str, text: str) -> str:
        """Hand one mail to the server and return its Message-ID.

        Args:
            message_id: id of the message that asks for this mail, with a suffix if it asks for
                several.
            to: one address.
            subject: one line.
            text: plain text.

        Raises:
            aiosmtplib.SMTPException: refused, or no connection; the caller's message is retried.
        """
        full_id = f"<{message_id}@{self._domain}>"
        content = self._composed(full_id, to, subject, text)
        smtp = await self._idle.get()
        try:
            await self._handed_over(smtp, to, content)
        except aiosmtplib.SMTPServerDisconnected:
            # The server closed an idle connection, or was restarted: once more, on a new one.
            await self._handed_over(smtp, to, content)
        finally:
            self._idle.put_nowait(smtp)
        return full_id

    def _composed(self, full_id: str, to: str, subject: str, text: str) -> bytes:
        headers = {
            "Message-ID": full_id,
            "Date": formatdate(),
            "From": self._sender,
            "To": to,
            "Subject": subject,
        }
        # MIMEText takes 0.12 ms, EmailMessage 0.64; but it does not check for line breaks.
        mail = MIMEText(text, "plain", "us-ascii" if text.isascii() else "utf-8")
        for name, value in headers.items():
            if "\n" in value or "\r" in value:
                raise ValueError(f"{name} of a mail holds a line break: {value!r}; allowed: one line")
            mail[name] = value
        return mail.as_bytes()

    async def _handed_over(self, smtp: aiosmtplib.SMTP, to: str, content: bytes) -> None:
        try:
            if not smtp.is_connected:
                await smtp.connect()
            await smtp.sendmail(self._sender, [to], content)
        except aiosmtplib.SMTPResponseException:
            # The server answered: the conversation is in step and can go on.
            raise
        except BaseException:
            # Timed out or cancelled midway: an answer may still come, and would be taken for the
            # next command's.
            smtp.close()
            raise

    async def close(self) -> None:
        """Close the connections."""
        for smtp in self._all:
            smtp.close()


async def open_mail() -> AsyncIterator[Mail]:
    """Provide `Mail` from SMTP_URL and MAIL_FROM."""
    mail = Mail(
        required("SMTP_URL", "the mail server, 'smtp://host:port'"),
        required("MAIL_FROM", "the sender's address, 'shop@example.com'"),
    )
    try:
        yield mail
    finally:
        await mail.close()
