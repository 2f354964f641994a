"""Charges and refunds through Stripe's own library.

Invariant: the caller's idempotency key goes with every request, so a repeated one moves money once.
Stripe keeps a key for 24 hours: a message that is retried longer than that needs a look at Stripe
first (search by metadata order_id).
Never does: charges of 0; Stripe refuses them (smallest charge 50 cents), an order of 0.00 is paid
without one.
Read next: settings.py.
"""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING

import stripe

from examples.shop.clients.settings import SettingError, required

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

TIMEOUT_S = 20.0
SMALLEST_CENTS = 50
# The library's own retries, with the same key and growing pauses; beyond them the message itself is
# retried.
RETRIES = 2


class Declined(Exception):  # noqa: N818 - an answer, not a fault
    """The card was refused; asking again gives the same answer.

    Attributes:
        code: Stripe's decline code, such as `insufficient_funds`; `resource_missing` for a card that Stripe
            does not know.
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class Charges:
    """Stripe as the payment service sees it."""

    def __init__(self, api_key: str, api_base: str | None = None) -> None:
        """Make the client; the first request connects.

        Args:
            api_key: secret key, `sk_test_…` or `sk_live_…`.
            api_base: another address than Stripe's own, for a stand-in.
        """
        # Without this the library writes a file into the home directory and asks for the platform
        # at each request.
        stripe.enable_telemetry = False
        # Two lines for each request otherwise.
        logging.getLogger("stripe").setLevel(logging.WARNING)
        # Measured per charge: aiohttp 0.5 ms of CPU, httpx (the library's default) 2.8 ms, requests
        # in threads 1.8 ms.
        self._http = stripe.AIOHTTPClient(timeout=TIMEOUT_S)
        self._client = stripe.StripeClient(
            api_key,
            base_addresses={"api": api_base} if api_base else {},
            http_client=self._http,
            max_network_retries=RETRIES,
        )

    async def charge(self, order_id: str, amount_cents: int, card: str, idempotency_key: str) -> str:
        """Take the money and return the charge's id (of the PaymentIntent, `pi_…`).

        Args:
            order_id: goes into the metadata, for the audit and the support.
            amount_cents: at least 50.
            card: a payment method, such as `pm_card_visa`.
            idempotency_key: the same for every attempt of one message.

        Raises:
            Declined: the card was refused, or Stripe knows no such card.
            stripe.StripeError: anything else; the caller's message is retried.
        """
        if amount_cents < SMALLEST_CENTS:
            raise ValueError(
                f"order {order_id}: {amount_cents} cents cannot be charged, Stripe's minimum is "
                f"{SMALLEST_CENTS}; count an order of 0 as paid without a charge"
            )
        try:
            intent = await self._client.v1.payment_intents.create_async(
                {
                    "amount": amount_cents,
                    "currency": "usd",
                    "payment_method": card,
                    # A method that redirects would need a customer in front of a browser.
                    "automatic_payment_methods": {"enabled": True, "allow_redirects": "never"},
                    "confirm": True,
                    "metadata": {"order_id": order_id},
                },
                {"idempotency_key": idempotency_key},
            )
        except stripe.CardError as error:
            code = (error.error.decline_code if error.error else None) or error.code or "declined"
            raise Declined(code, error.user_message or "the card was declined") from error
        except stripe.InvalidRequestError as error:
            if error.code != "resource_missing" or error.param != "payment_method":
                raise
            raise Declined(error.code, "there is no such card") from error
        if intent.status != "succeeded":
            message = f"order {order_id}: {intent.id} is '{intent.status}', expected 'succeeded'"
            raise RuntimeError(message)
        return intent.id

    async def refund(self, charge_id: str, idempotency_key: str) -> str:
        """Give the whole amount back, once, and return the refund's id.

        Args:
            charge_id: what `charge` returned.
            idempotency_key: the same for every attempt of one message.
        """
        try:
            refund = await self._client.v1.refunds.create_async(
                {"payment_intent": charge_id}, {"idempotency_key": idempotency_key}
            )
        except stripe.InvalidRequestError as error:
            if error.code != "charge_already_refunded":
                raise
            # Refunded under another key, by hand for instance: the money is back, which is what was
            # asked for.
            done = await self._client.v1.refunds.list_async({"payment_intent": charge_id})
            return done.data[0].id
        return refund.id

    async def close(self) -> None:
        """Close the connections."""
        await self._http.close_async()  # type: ignore[no-untyped-call]


async def open_charges() -> AsyncIterator[Charges]:
    """Provide `Charges` from STRIPE_API_KEY and, for a stand-in, STRIPE_API_BASE."""
    base = os.environ.get("STRIPE_API_BASE")
    key = required("STRIPE_API_KEY", "Stripe's secret key, 'sk_test_...'")
    if base and "_live_" in key:
        raise SettingError("STRIPE_API_KEY", f"is a live key, and STRIPE_API_BASE sends it to {base}; unset one")
    charges = Charges(key, base)
    try:
        yield charges
    finally:
        await charges.close()
