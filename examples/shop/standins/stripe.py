"""A stand-in of Stripe: PaymentIntents, Refunds and idempotency keys, in Stripe's shapes.

Invariant: the money moved and the answer saved under its idempotency key are one commit, made
before the answer is sent.
Never does: anything with a live key; 3-D Secure, partial refunds and capture later are refused by
name.
Source: docs.stripe.com/api/payment_intents, /api/refunds, /api/errors, /api/idempotent_requests and
/testing; API version 2026-10-28.
Read next: ledger.py, wire.py.

The file for an audit: table `charge` (every attempt, declined ones too), table `refund`, and the
view `ledger` (money moved: `kind` charge or refund, `payment_intent`, `order_id`, `amount_cents`
negative for a refund, `created`); `replays` in table `idempotency` counts repeated requests.
"""

from __future__ import annotations

import asyncio
import json
import re
import secrets
import time
from dataclasses import dataclass
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from examples.shop.standins.ledger import open_ledger, transaction
from examples.shop.standins.wire import Reply, Request, arguments, json_reply, run_alone

if TYPE_CHECKING:
    from collections.abc import Callable

SCHEMA = """
CREATE TABLE IF NOT EXISTS charge (
    number INTEGER PRIMARY KEY,
    payment_intent TEXT NOT NULL UNIQUE,
    charge TEXT NOT NULL UNIQUE,
    amount_cents INTEGER NOT NULL,
    currency TEXT NOT NULL,
    payment_method TEXT NOT NULL,
    status TEXT NOT NULL CHECK (status IN ('succeeded', 'declined')),
    decline_code TEXT,
    order_id TEXT,
    description TEXT,
    metadata TEXT NOT NULL,
    idempotency_key TEXT,
    created REAL NOT NULL
);
CREATE TABLE IF NOT EXISTS refund (
    number INTEGER PRIMARY KEY,
    refund TEXT NOT NULL UNIQUE,
    payment_intent TEXT NOT NULL UNIQUE REFERENCES charge (payment_intent),
    amount_cents INTEGER NOT NULL,
    metadata TEXT NOT NULL,
    idempotency_key TEXT,
    created REAL NOT NULL
);
CREATE TABLE IF NOT EXISTS idempotency (
    account TEXT NOT NULL,
    key TEXT NOT NULL,
    request TEXT NOT NULL,
    status INTEGER NOT NULL,
    body TEXT NOT NULL,
    request_id TEXT NOT NULL,
    created REAL NOT NULL,
    replays INTEGER NOT NULL DEFAULT 0,
    PRIMARY KEY (account, key)
) WITHOUT ROWID;
CREATE VIEW IF NOT EXISTS ledger AS
    SELECT 'charge' AS kind, payment_intent, order_id, amount_cents, created
        FROM charge WHERE status = 'succeeded'
    UNION ALL
    SELECT 'refund', r.payment_intent, c.order_id, -r.amount_cents, r.created
        FROM refund AS r JOIN charge AS c USING (payment_intent);
"""

KEY_LIFE_S = 24 * 3600
KEY_LENGTH = 255
SMALLEST_CENTS = 50
LARGEST_CENTS = 99_999_999
PAGE_LIMIT = 100

_TEST_KEY = re.compile(r"(?:sk|rk)_test_\w+")
_BRACKET = re.compile(r"\[([^\[\]]*)\]")


@dataclass(frozen=True, slots=True)
class Decline:
    """How an issuer refuses a card."""

    code: str
    decline_code: str
    message: str


_GENERIC = Decline("card_declined", "generic_decline", "Your card was declined.")
_EMPTY = Decline("card_declined", "insufficient_funds", "Your card has insufficient funds.")
_LOST = Decline("card_declined", "lost_card", "Your card was declined.")
_STOLEN = Decline("card_declined", "stolen_card", "Your card was declined.")
_EXPIRED = Decline("expired_card", "expired_card", "Your card has expired.")
_CVC = Decline("incorrect_cvc", "incorrect_cvc", "Your card's security code is incorrect.")
_PROCESSING = Decline(
    "processing_error",
    "processing_error",
    "An error occurred while processing your card. Try again in a little bit.",
)

CARDS: dict[str, Decline | None] = {
    "pm_card_visa": None,
    "pm_card_mastercard": None,
    "pm_card_amex": None,
    "pm_card_discover": None,
    "pm_card_chargeDeclined": _GENERIC,
    "pm_card_visa_chargeDeclined": _GENERIC,
    "pm_card_chargeDeclinedInsufficientFunds": _EMPTY,
    "pm_card_visa_chargeDeclinedInsufficientFunds": _EMPTY,
    "pm_card_visa_chargeDeclinedLostCard": _LOST,
    "pm_card_visa_chargeDeclinedStolenCard": _STOLEN,
    "pm_card_chargeDeclinedExpiredCard": _EXPIRED,
    "pm_card_chargeDeclinedIncorrectCvc": _CVC,
    "pm_card_chargeDeclinedProcessingError": _PROCESSING,
}
"""Test payment methods of Stripe; None means the charge succeeds."""

_CREATE_PARAMETERS = frozenset(
    {
        "amount",
        "currency",
        "payment_method",
        "allowed_payment_method_types",
        "automatic_payment_methods",
        "confirm",
        "metadata",
        "description",
        "off_session",
        "return_url",
        "receipt_email",
        "statement_descriptor_suffix",
        "expand",
    }
)
_NESTED = frozenset({"metadata", "automatic_payment_methods", "allowed_payment_method_types", "expand"})
_PAGE_PARAMETERS = frozenset({"limit", "starting_after", "payment_intent", "expand"})
_REFUND_PARAMETERS = frozenset({"payment_intent", "charge", "amount", "metadata", "reason", "expand"})


class ApiError(Exception):
    """An answer in Stripe's error shape that is not saved under the idempotency key."""

    def __init__(self, status: int, message: str, *, kind: str = "invalid_request_error", **more: object) -> None:
        super().__init__(message)
        self.reply = _error(status, message, kind, **more)


def _error(status: int, message: str, kind: str = "invalid_request_error", **more: object) -> Reply:
    code = more.get("code")
    if isinstance(code, str):
        more["doc_url"] = f"https://stripe.com/docs/error-codes/{code.replace('_', '-')}"
    return json_reply(status, {"error": {"message": message, "type": kind, **more}})


class Stripe:
    """The API: `answer` takes a request and returns what Stripe would."""

    def __init__(self, database: str, *, authorisation_s: float = 0.0) -> None:
        """Open the ledger.

        Args:
            database: its file.
            authorisation_s: how long the card network takes for a charge; above 0, a second request
                with the same idempotency key can arrive meanwhile and gets 409, as at Stripe.
        """
        self._database = open_ledger(database, SCHEMA)
        self._authorisation_s = authorisation_s
        self._in_use: set[tuple[str, str]] = set()

    async def answer(self, request: Request) -> Reply:
        """Answer one request; the answer carries a `Request-Id`."""
        request_id = f"req_{secrets.token_hex(7)}"
        try:
            account = _account(request)
            if request.method == "POST":
                reply = await self._post(request, account, request_id)
            elif request.method == "GET":
                reply = self._get(request)
            else:
                raise _unknown_url(request)
        except ApiError as error:
            reply = error.reply
        # Never retry a 4xx but 409: the same request would be refused again.
        retry = b"true" if reply.status == HTTPStatus.CONFLICT else b"false"
        named = ((b"request-id", request_id.encode()), (b"stripe-should-retry", retry))
        return Reply(reply.status, reply.body, (*named, *reply.headers))

    async def _post(self, request: Request, account: str, request_id: str) -> Reply:
        """Run a POST once per idempotency key: same key and parameters replay the saved answer."""
        key = request.headers.get("idempotency-key", "")
        if not key:
            execute = await self._prepared(request, "")
            with transaction(self._database):
                return execute()
        if len(key) > KEY_LENGTH:
            message = f"Idempotency keys must be up to {KEY_LENGTH} characters; got {len(key)}."
            raise ApiError(400, message)
        fingerprint = json.dumps([request.path, sorted(request.form())])
        saved = self._saved(account, key, fingerprint)
        if saved is not None:
            return saved
        if (account, key) in self._in_use:
            raise _key_in_use(key)
        self._in_use.add((account, key))
        try:
            execute = await self._prepared(request, key)
            with transaction(self._database):
                reply = execute()
                self._database.execute(
                    "INSERT INTO idempotency VALUES (?, ?, ?, ?, ?, ?, ?, 0)",
                    (account, key, fingerprint, reply.status, reply.body, request_id, time.time()),
                )
        finally:
            self._in_use.discard((account, key))
        return Reply(reply.status, reply.body, ((b"idempotency-key", key.encode("latin-1")),))

    def _saved(self, account: str, key: str, fingerprint: str) -> Reply | None:
        row = self._database.execute(
            "SELECT request, status, body, request_id, created FROM idempotency WHERE account = ? AND key = ?",
            (account, key),
        ).fetchone()
        if row is None:
            return None
        if row[4] < time.time() - KEY_LIFE_S:
            self._database.execute("DELETE FROM idempotency WHERE account = ? AND key = ?", (account, key))
            return None
        if row[0] != fingerprint:
            message = (
                "Keys for idempotent requests can only be used with the same parameters they "
                "were first used with. "
                f"Try using a key other than '{key}' if you meant to execute a different request."
            )
            raise ApiError(400, message, kind="idempotency_error")
        self._database.execute(
            "UPDATE idempotency SET replays = replays + 1 WHERE account = ? AND key = ?", (account, key)
        )
        headers = (
            (b"idempotency-key", key.encode("latin-1")),
            (b"idempotent-replayed", b"true"),
            (b"original-request", row[3].encode()),
        )
        return Reply(row[1], row[2], headers)

    async def _prepared(self, request: Request, key: str) -> Callable[[], Reply]:
        """Check the parameters, wait for the card network; return what runs in the transaction."""
        parameters = nested(request.form())
        if request.path == "/v1/payment_intents":
            charge = _checked_charge(parameters)
            if self._authorisation_s > 0:
                await asyncio.sleep(self._authorisation_s)
            return lambda: self._charge(charge, key)
        if request.path == "/v1/refunds":
            _refuse_unknown(parameters, _REFUND_PARAMETERS)
            return lambda: self._refund(parameters, key)
        raise _unknown_url(request)

    def _charge(self, charge: dict[str, Any], key: str) -> Reply:
        decline = CARDS[charge["payment_method"]]
        payment_intent = f"pi_{secrets.token_hex(12)}"
        self._database.execute(
            "INSERT INTO charge (payment_intent, charge, amount_cents, currency, payment_method,"
            " status, decline_code, order_id, description, metadata, idempotency_key, created)"
            " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (
                payment_intent,
                f"ch_{secrets.token_hex(12)}",
                charge["amount"],
                charge["currency"],
                charge["payment_method"],
                "declined" if decline else "succeeded",
                decline.decline_code if decline else None,
                charge["metadata"].get("order_id"),
                charge.get("description"),
                json.dumps(charge["metadata"]),
                key or None,
                time.time(),
            ),
        )
        intent = self._intent(payment_intent)
        return json_reply(200, intent) if decline is None else _declined(decline, intent)

    def _refund(self, parameters: dict[str, Any], key: str) -> Reply:
        row = self._refundable(parameters)
        payment_intent, charge, amount, currency = row
        if str(parameters.get("amount", amount)) != str(amount):
            message = f"This stand-in refunds the whole amount only ({amount})."
            raise ApiError(400, message, param="amount")
        done = self._database.execute("SELECT 1 FROM refund WHERE payment_intent = ?", (payment_intent,)).fetchone()
        if done:
            message = f"Charge {charge} has already been refunded."
            return _error(400, message, code="charge_already_refunded")
        refund, created = f"re_{secrets.token_hex(12)}", time.time()
        metadata = _metadata(parameters)
        self._database.execute(
            "INSERT INTO refund (refund, payment_intent, amount_cents, metadata, idempotency_key,"
            " created) VALUES (?, ?, ?, ?, ?, ?)",
            (refund, payment_intent, amount, json.dumps(metadata), key or None, created),
        )
        values = (refund, payment_intent, charge, amount, currency, json.dumps(metadata), created)
        return json_reply(200, _refund_object(values))

    def _refundable(self, parameters: dict[str, Any]) -> tuple[str, str, int, str]:
        for name in ("payment_intent", "charge"):
            wanted = parameters.get(name)
            if wanted is None:
                continue
            row = self._database.execute(
                "SELECT payment_intent, charge, amount_cents, currency, status FROM charge"  # noqa: S608 - one of two names
                f" WHERE {name} = ?",
                (wanted,),
            ).fetchone()
            if row is None:
                raise _missing(name, wanted)
            if row[4] != "succeeded":
                message = f"This PaymentIntent ({row[0]}) does not have a successful charge to refund."
                raise ApiError(400, message, param=name)
            return (row[0], row[1], row[2], row[3])
        message = "One of the following params should be provided for this request: "
        raise ApiError(400, message + "payment_intent or charge.", code="parameter_missing")

    def _get(self, request: Request) -> Reply:
        parts = request.path.strip("/").split("/")
        query = nested(request.form())
        match parts:
            case ["v1", "payment_intents"]:
                return self._listed(request.path, query, "payment_intent", self._intents)
            case ["v1", "payment_intents", name]:
                return json_reply(200, self._intent(name))
            case ["v1", "refunds"]:
                return self._listed(request.path, query, "refund", self._refunds)
            case ["v1", "refunds", name]:
                found = self._refunds("WHERE r.refund = ?", (name,))
                if not found:
                    raise _missing("refund", name)
                return json_reply(200, found[0])
            case _:
                raise _unknown_url(request)

    def _intent(self, name: str) -> dict[str, Any]:
        found = self._intents("WHERE c.payment_intent = ?", (name,))
        if not found:
            raise _missing("intent", name)
        return found[0]

    def _intents(self, where: str, values: tuple[object, ...]) -> list[dict[str, Any]]:
        rows = self._database.execute(
            "SELECT payment_intent, charge, amount_cents, currency, payment_method, status,"  # noqa: S608 - fixed text
            f" description, metadata, created FROM charge AS c {where}",
            values,
        )
        return [_intent_object(row) for row in rows]

    def _refunds(self, where: str, values: tuple[object, ...]) -> list[dict[str, Any]]:
        rows = self._database.execute(
            "SELECT r.refund, r.payment_intent, c.charge, r.amount_cents, c.currency, r.metadata,"  # noqa: S608 - fixed text
            f" r.created FROM refund AS r JOIN charge AS c USING (payment_intent) {where}",
            values,
        )
        return [_refund_object(row) for row in rows]

    def _listed(
        self,
        path: str,
        query: dict[str, Any],
        table: str,
        fetch: Callable[[str, tuple[object, ...]], list[dict[str, Any]]],
    ) -> Reply:
        """Return a page, newest first, after `starting_after` (docs.stripe.com/api/pagination)."""
        _refuse_unknown(query, _PAGE_PARAMETERS)
        limit = _whole(query, "limit", default=10, low=1, high=PAGE_LIMIT)
        prefix, source = ("c", "charge") if table == "payment_intent" else ("r", "refund")
        where, values = ["1"], list[object]()
        if table == "refund" and "payment_intent" in query:
            where.append("r.payment_intent = ?")
            values.append(query["payment_intent"])
        if after := query.get("starting_after"):
            where.append(f"{prefix}.number < (SELECT number FROM {source} WHERE {table} = ?)")  # noqa: S608 - fixed text
            values.append(after)
        order = f"ORDER BY {prefix}.number DESC LIMIT {limit + 1}"
        clause = f"WHERE {' AND '.join(where)} {order}"
        found = fetch(clause, tuple(values))
        page = {"object": "list", "url": path, "has_more": len(found) > limit}
        return json_reply(200, page | {"data": found[:limit]})


def nested(pairs: list[tuple[str, str]]) -> dict[str, Any]:
    """Return form fields as nested parameters; `expand[]=x` means `expand[0]=x`.

    >>> nested([("amount", "5"), ("metadata[order_id]", "7"), ("expand[0]", "x")])
    {'amount': '5', 'metadata': {'order_id': '7'}, 'expand': {'0': 'x'}}
    """
    result: dict[str, Any] = {}
    for name, value in pairs:
        head, bracket, rest = name.partition("[")
        if not bracket:
            result[name] = value
            continue
        path = [head, *_BRACKET.findall("[" + rest)]
        place = result
        for step in path[:-1]:
            below = place.setdefault(step, {})
            if not isinstance(below, dict):
                raise ApiError(400, f"Invalid object: {name}", param=name)
            place = below
        place[path[-1] or str(len(place))] = value
    return result


def _account(request: Request) -> str:
    """Return the secret key; a live one is refused, it has no business with a stand-in."""
    kind, _, key = request.headers.get("authorization", "").partition(" ")
    if kind.lower() != "bearer" or not key:
        message = (
            "You did not provide an API key. You need to provide your API key in the "
            "Authorization header, "
            "using Bearer auth (e.g. 'Authorization: Bearer YOUR_SECRET_KEY')."
        )
        raise ApiError(401, message)
    if not _TEST_KEY.fullmatch(key):
        shown = f"{key[:8]}{'*' * 8}"
        message = f"Invalid API Key provided: {shown}. This stand-in takes sk_test_ keys only."
        raise ApiError(401, message)
    return key


def _checked_charge(parameters: dict[str, Any]) -> dict[str, Any]:
    _refuse_unknown(parameters, _CREATE_PARAMETERS)
    for name in ("amount", "currency"):
        if name not in parameters:
            message = f"Missing required param: {name}."
            raise ApiError(400, message, code="parameter_missing", param=name)
    amount = _whole(parameters, "amount", default=0, low=1, high=LARGEST_CENTS)
    if parameters["currency"] != "usd":
        message = f"Invalid currency: {parameters['currency']}. This stand-in charges in usd."
        raise ApiError(400, message, param="currency")
    if amount < SMALLEST_CENTS:
        message = "Amount must be at least $0.50 usd"
        raise ApiError(400, message, code="amount_too_small", param="amount")
    if parameters.get("confirm") != "true":
        raise ApiError(400, "This stand-in needs confirm=true.", param="confirm")
    method = parameters.get("payment_method")
    if method is None:
        message = (
            "You cannot confirm this PaymentIntent because it's missing a payment method. You "
            "can either update the "
            "PaymentIntent with a payment method and then confirm it again, or confirm it again "
            "directly with a "
            "payment method or ConfirmationToken."
        )
        raise ApiError(400, message, code="payment_intent_unexpected_state")
    if method not in CARDS:
        raise _missing("payment_method", method)
    _needs_no_redirect(parameters)
    return {**parameters, "amount": amount, "metadata": _metadata(parameters)}


def _needs_no_redirect(parameters: dict[str, Any]) -> None:
    """Refuse methods that may redirect without a return_url (Stripe since 2023-08-16)."""
    automatic = parameters.get("automatic_payment_methods") or {}
    cards_only = "allowed_payment_method_types" in parameters or automatic.get("allow_redirects") == "never"
    if not cards_only and "return_url" not in parameters:
        message = (
            "This PaymentIntent is configured to accept payment methods enabled in your "
            "Dashboard. Because some of "
            "these payment methods might redirect your customer off of your page, you must "
            "provide a `return_url`. "
            "If you don't want to accept redirect-based payment methods, set "
            "`automatic_payment_methods[enabled]` to `true` and "
            "`automatic_payment_methods[allow_redirects]` to "
            "`never` when creating Setup Intents and Payment Intents."
        )
        raise ApiError(400, message)


def _refuse_unknown(parameters: dict[str, Any], known: frozenset[str]) -> None:
    for name, value in parameters.items():
        if name not in known:
            message = f"Received unknown parameter: {name}"
            raise ApiError(400, message, code="parameter_unknown", param=name)
        if isinstance(value, dict) != (name in _NESTED) and value:
            message = f"Invalid {'object' if name in _NESTED else 'string'}: {name}"
            raise ApiError(400, message, param=name)


def _whole(parameters: dict[str, Any], name: str, *, default: int, low: int, high: int) -> int:
    text = str(parameters.get(name, default))
    if not re.fullmatch(r"-?[0-9]{1,15}", text):
        message = f"Invalid integer: {text}"
        raise ApiError(400, message, code="parameter_invalid_integer", param=name)
    number = int(text)
    if number < low:
        message = f"This value must be greater than or equal to {low}."
        raise ApiError(400, message, code="parameter_invalid_integer", param=name)
    if number > high:
        message = f"This value must be less than or equal to {high}."
        raise ApiError(400, message, code="parameter_invalid_integer", param=name)
    return number


def _metadata(parameters: dict[str, Any]) -> dict[str, str]:
    metadata = parameters.get("metadata") or {}
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise ApiError(400, "Invalid metadata: keys with text values.", param="metadata")
    return metadata


def _declined(decline: Decline, intent: dict[str, Any]) -> Reply:
    charge = intent["latest_charge"]
    common = {"charge": charge, "code": decline.code, "decline_code": decline.decline_code}
    last = {**common, "message": decline.message, "type": "card_error"}
    seen = intent | {"last_payment_error": last}
    return _error(402, decline.message, "card_error", **common, payment_intent=seen)


def _intent_object(row: tuple[Any, ...]) -> dict[str, Any]:
    name, charge, amount, currency, method, status, description, metadata, created = row
    succeeded = status == "succeeded"
    return {
        "id": name,
        "object": "payment_intent",
        "amount": amount,
        "amount_capturable": 0,
        "amount_received": amount if succeeded else 0,
        "capture_method": "automatic_async",
        "client_secret": f"{name}_secret_{charge[3:]}",
        "confirmation_method": "automatic",
        "created": int(created),
        "currency": currency,
        "description": description,
        "last_payment_error": None,
        "latest_charge": charge,
        "livemode": False,
        "metadata": json.loads(metadata),
        "next_action": None,
        "payment_method": method if succeeded else None,
        "payment_method_types": ["card"],
        "status": "succeeded" if succeeded else "requires_payment_method",
    }


def _refund_object(row: tuple[Any, ...]) -> dict[str, Any]:
    name, payment_intent, charge, amount, currency, metadata, created = row
    return {
        "id": name,
        "object": "refund",
        "amount": amount,
        "charge": charge,
        "created": int(created),
        "currency": currency,
        "metadata": json.loads(metadata),
        "payment_intent": payment_intent,
        "reason": None,
        "receipt_number": None,
        "status": "succeeded",
    }


def _missing(param: str, name: object) -> ApiError:
    kinds = {"payment_method": "PaymentMethod", "charge": "charge", "refund": "refund"}
    message = f"No such {kinds.get(param, 'payment_intent')}: '{name}'"
    status = 400 if param in {"payment_method", "payment_intent", "charge"} else 404
    return ApiError(status, message, code="resource_missing", param=param)


def _key_in_use(key: str) -> ApiError:
    message = (
        f"There is currently another in-progress request using this Idempotent Key ({key}). That "
        "probably means you "
        "submitted twice, and the other request is still going through. Please try again later."
    )
    return ApiError(409, message, kind="idempotency_error", code="idempotency_key_in_use")


def _unknown_url(request: Request) -> ApiError:
    message = (
        f"Unrecognized request URL ({request.method}: {request.path}). This stand-in has payment_intents and refunds."
    )
    return ApiError(404, message)


if __name__ == "__main__":
    run_alone(
        lambda options: Stripe(options.database, authorisation_s=options.authorisation_seconds).answer,
        arguments(
            __doc__,
            database="stripe-ledger.db",
            more=[("--authorisation-seconds", 0.0, "how long the card network takes")],
        ),
    )
