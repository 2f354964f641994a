"""A mail server that keeps what it is given: real SMTP on loopback, nothing is sent on.

Invariant: a message is in the file before its `250`. Table `delivery` has one row for each
recipient of each accepted message, so a message that was delivered twice is there twice; table
`mailbox` has what the recipient sees: one per Message-ID, as mail systems that suppress duplicates
by Message-ID show it (RFC 5322 §3.6.4 makes the id unique).
Never does: relay, authentication, TLS. Read next: ../clients/mail.py.
"""

from __future__ import annotations

import asyncio
import email
import secrets
import time
from email.errors import HeaderParseError
from email.header import decode_header, make_header
from email.message import Message

from aiosmtpd.smtp import SMTP, Envelope, Session

from examples.shop.standins.ledger import open_ledger, transaction
from examples.shop.standins.wire import LOOPBACK, arguments, run, say, stop_event

SCHEMA = """
CREATE TABLE IF NOT EXISTS delivery (
    number INTEGER PRIMARY KEY,
    message_id TEXT NOT NULL,
    sender TEXT NOT NULL,
    recipient TEXT NOT NULL,
    subject TEXT NOT NULL,
    body TEXT NOT NULL,
    received REAL NOT NULL
);
CREATE INDEX IF NOT EXISTS delivery_message ON delivery (message_id);
CREATE TABLE IF NOT EXISTS mailbox (
    recipient TEXT NOT NULL,
    message_id TEXT NOT NULL,
    delivery INTEGER NOT NULL REFERENCES delivery (number),
    PRIMARY KEY (recipient, message_id)
) WITHOUT ROWID;
"""

SIZE_LIMIT_BYTES = 1024 * 1024


class MailServer:
    """The hooks aiosmtpd calls, and the port it listens on."""

    def __init__(self, database: str) -> None:
        """Open the ledger in the file `database`."""
        self._database = open_ledger(database, SCHEMA)

    async def handle_DATA(  # noqa: N802 - aiosmtpd's hook
        self,
        server: SMTP,  # noqa: ARG002
        session: Session,  # noqa: ARG002
        envelope: Envelope,
    ) -> str:
        """Store the message, then accept it."""
        content = envelope.content
        raw = content.encode() if isinstance(content, str) else content or b""
        # The parser's old policy: the new one (EmailMessage) costs 1.3 ms more for each mail.
        parsed = email.message_from_bytes(raw)
        # RFC 6409 §8.3: a submission server adds the id that a client left out.
        message_id = str(parsed["Message-ID"] or f"<{secrets.token_hex(8)}@standin>").strip()
        subject = _decoded(str(parsed["Subject"] or ""))
        body = _plain_text(parsed)
        with transaction(self._database):
            for recipient in envelope.rcpt_tos:
                row = (message_id, envelope.mail_from, recipient, subject, body, time.time())
                number = self._database.execute(
                    "INSERT INTO delivery (message_id, sender, recipient, subject, body, received)"
                    " VALUES (?, ?, ?, ?, ?, ?)",
                    row,
                ).lastrowid
                self._database.execute(
                    "INSERT OR IGNORE INTO mailbox VALUES (?, ?, ?)",
                    (recipient, message_id, number),
                )
        return "250 OK"

    async def listen(self, port: int) -> tuple[asyncio.Server, str]:
        """Listen on loopback; return the server and its URL."""
        loop = asyncio.get_running_loop()

        def connection() -> SMTP:
            return SMTP(
                self,
                loop=loop,
                hostname="localhost",
                ident="mail stand-in",
                data_size_limit=SIZE_LIMIT_BYTES,
            )

        server = await loop.create_server(connection, LOOPBACK, port)
        return server, f"smtp://{LOOPBACK}:{server.sockets[0].getsockname()[1]}"


def _decoded(header: str) -> str:
    """Return the text of an encoded header (RFC 2047); a malformed one as it is."""
    try:
        return str(make_header(decode_header(header)))
    except (HeaderParseError, LookupError, UnicodeError):
        return header


def _plain_text(mail: Message) -> str:
    """Return the first text/plain part, with the line ends of text."""
    for part in mail.walk():
        if part.get_content_type() == "text/plain":
            content = part.get_payload(decode=True)
            charset = part.get_content_charset("utf-8")
            try:
                text = content.decode(charset, "replace") if isinstance(content, bytes) else ""
            except LookupError:
                # A charset that does not exist: keep every byte as a character.
                text = content.decode("latin-1") if isinstance(content, bytes) else ""
            return text.replace("\r\n", "\n")
    return ""


async def _main() -> None:
    options = arguments(__doc__, database="mail-ledger.db")
    stop = stop_event()
    server, url = await MailServer(options.database).listen(options.port)
    say(f"listening on {url}")
    await stop.wait()
    server.close()


if __name__ == "__main__":
    run(_main)
