"""A stand-in of Twilio's Messages: send an SMS, list what was sent, in Twilio's shapes.

Invariant: an SMS is in the file before its 201 is sent. Every POST that is accepted is one SMS: as
at Twilio there are no idempotency keys, so a client that sends twice has sent twice, and the file
shows it.
Source: twilio.com/docs/messaging/api/message-resource, /docs/usage/twilios-response (paging) and
/docs/api/errors.
Read next: ../clients/twilio.py, which avoids the second send.

The file for an audit: table `message`, one row per SMS.
"""

from __future__ import annotations

import base64
import hmac
import re
import secrets
import time
from datetime import UTC, datetime
from email.utils import format_datetime
from typing import Any
from urllib.parse import urlencode

from examples.shop.standins.ledger import open_ledger
from examples.shop.standins.wire import Reply, Request, arguments, json_reply, run_alone

SCHEMA = """
CREATE TABLE IF NOT EXISTS message (
    number INTEGER PRIMARY KEY,
    sid TEXT NOT NULL UNIQUE,
    account_sid TEXT NOT NULL,
    to_number TEXT NOT NULL,
    from_number TEXT NOT NULL,
    body TEXT NOT NULL,
    created REAL NOT NULL
);
CREATE INDEX IF NOT EXISTS message_to ON message (account_sid, to_number, number);
"""

BODY_LIMIT = 1600
SEGMENT = 160
PAGE_LIMIT = 1000

_PATH = re.compile(r"/2010-04-01/Accounts/(AC[0-9a-f]{32})/Messages(?:/(SM[0-9a-f]{32}))?\.json")
_E164 = re.compile(r"\+[1-9][0-9]{6,14}")
_BODY_CODES = {"To": 21604, "From": 21603, "Body": 21602}


class ApiError(Exception):
    """An answer in Twilio's error shape."""

    def __init__(self, status: int, code: int, message: str) -> None:
        super().__init__(message)
        content = {
            "code": code,
            "message": message,
            "more_info": f"https://www.twilio.com/docs/errors/{code}",
            "status": status,
        }
        self.reply = json_reply(status, content)


class Twilio:
    """The API: `answer` takes a request and returns what Twilio would."""

    def __init__(self, database: str, *, auth_token: str | None = None) -> None:
        """Open the ledger.

        Args:
            database: its file.
            auth_token: the token every account must send; None takes any, but there must be one.
        """
        self._database = open_ledger(database, SCHEMA)
        self._auth_token = auth_token

    async def answer(self, request: Request) -> Reply:
        """Answer one request."""
        try:
            return self._routed(request)
        except ApiError as error:
            return error.reply

    def _routed(self, request: Request) -> Reply:
        match = _PATH.fullmatch(request.path)
        if match is None:
            message = f"The requested resource {request.path} was not found"
            raise ApiError(404, 20404, message)
        account, sid = match.groups()
        self._authenticate(request, account)
        if request.method == "GET":
            return self._fetch(account, sid) if sid else self._page(request, account)
        if request.method == "POST" and sid is None:
            return self._send(account, dict(request.form()))
        raise ApiError(405, 20004, "Method not allowed")

    def _authenticate(self, request: Request, account: str) -> None:
        kind, _, credentials = request.headers.get("authorization", "").partition(" ")
        user, _, token = _decoded(credentials).partition(":")
        right = self._auth_token is None or hmac.compare_digest(token, self._auth_token)
        if kind.lower() != "basic" or user != account or not token or not right:
            raise ApiError(401, 20003, "Authenticate")

    def _send(self, account: str, form: dict[str, str]) -> Reply:
        for name, code in _BODY_CODES.items():
            if not form.get(name):
                message = f"A '{name}' phone number is required." if name != "Body" else "Message body is required."
                raise ApiError(400, code, message)
        to, sender, body = form["To"], form["From"], form["Body"]
        if not _E164.fullmatch(to):
            raise ApiError(400, 21211, f"Invalid 'To' Phone Number: {to}")
        if not _E164.fullmatch(sender):
            raise ApiError(400, 21212, f"Invalid From Number (caller ID): {sender}")
        if len(body) > BODY_LIMIT:
            message = f"The concatenated message body exceeds the {BODY_LIMIT} character limit"
            raise ApiError(400, 21617, message)
        sid, created = f"SM{secrets.token_hex(16)}", time.time()
        self._database.execute(
            "INSERT INTO message (sid, account_sid, to_number, from_number, body, created) VALUES (?, ?, ?, ?, ?, ?)",
            (sid, account, to, sender, body, created),
        )
        sent = _message_object((0, sid, account, to, sender, body, created))
        # Twilio answers before the carrier has the message.
        return json_reply(201, sent | {"status": "queued", "date_sent": None})

    def _fetch(self, account: str, sid: str) -> Reply:
        row = self._database.execute(
            "SELECT * FROM message WHERE account_sid = ? AND sid = ?", (account, sid)
        ).fetchone()
        if row is None:
            raise ApiError(404, 20404, f"The requested resource Messages/{sid} was not found")
        return json_reply(200, _message_object(row))

    def _page(self, request: Request, account: str) -> Reply:
        """Return one page, newest first, filtered by To, From and DateSent (on, `<` and `>`)."""
        query = dict(request.form())
        size = min(max(_number(query, "PageSize", 50), 1), PAGE_LIMIT)
        where, values = ["account_sid = ?"], list[object]([account])
        for name, column in (("To", "to_number"), ("From", "from_number")):
            if name in query:
                where.append(f"{column} = ?")
                values.append(query[name])
        for name, comparison in (("DateSent>", ">="), ("DateSent<", "<=")):
            if name in query:
                where.append(f"created {comparison} ?")
                values.append(_moment(query[name]))
        if "DateSent" in query:
            where.append("date(created, 'unixepoch') = ?")
            values.append(query["DateSent"][:10])
        if "PageToken" in query:
            where.append("number < ?")
            values.append(_number(query, "PageToken", 0))
        rows = self._database.execute(
            f"SELECT * FROM message WHERE {' AND '.join(where)} ORDER BY number DESC LIMIT ?",  # noqa: S608 - fixed text
            (*values, size + 1),
        ).fetchall()
        return json_reply(200, _page_object(request.path, query, size, rows))


def _page_object(path: str, query: dict[str, str], size: int, rows: list[tuple[Any, ...]]) -> dict[str, Any]:
    page = _number(query, "Page", 0)
    shown = rows[:size]
    filters = {k: v for k, v in query.items() if k not in {"Page", "PageToken", "PageSize"}}

    def uri(**more: object) -> str:
        return f"{path}?{urlencode(filters | {'PageSize': size} | more)}"

    following = uri(Page=page + 1, PageToken=shown[-1][0]) if len(rows) > size else None
    return {
        "first_page_uri": uri(Page=0),
        "next_page_uri": following,
        "previous_page_uri": None,
        "page": page,
        "page_size": size,
        "start": page * size,
        "end": page * size + len(shown) - 1,
        "uri": uri(Page=page),
        "messages": [_message_object(row) for row in shown],
    }


def _message_object(row: tuple[Any, ...]) -> dict[str, Any]:
    _, sid, account, to, sender, body, created = row
    moment = format_datetime(datetime.fromtimestamp(created, UTC))
    path = f"/2010-04-01/Accounts/{account}/Messages/{sid}"
    return {
        "account_sid": account,
        "api_version": "2010-04-01",
        "body": body,
        "date_created": moment,
        "date_sent": moment,
        "date_updated": moment,
        "direction": "outbound-api",
        "error_code": None,
        "error_message": None,
        "from": sender,
        "messaging_service_sid": None,
        "num_media": "0",
        "num_segments": str(-(-len(body) // SEGMENT)),
        "price": None,
        "price_unit": "USD",
        "sid": sid,
        "status": "delivered",
        "subresource_uris": {"media": f"{path}/Media.json"},
        "to": to,
        "uri": f"{path}.json",
    }


def _decoded(credentials: str) -> str:
    try:
        return base64.b64decode(credentials, validate=True).decode()
    except ValueError:
        # Not base64 or not text: no credentials, so the caller answers 401.
        return ""


def _number(query: dict[str, str], name: str, default: int) -> int:
    text = query.get(name, "")
    return int(text) if re.fullmatch(r"[0-9]{1,15}", text) else default


def _moment(text: str) -> float:
    try:
        moment = datetime.fromisoformat(text)
    except ValueError as error:
        raise ApiError(400, 20001, f"Invalid date: {text}; expected YYYY-MM-DD") from error
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


if __name__ == "__main__":
    run_alone(
        lambda options: Twilio(options.database).answer,
        arguments(__doc__, database="twilio-ledger.db"),
    )
