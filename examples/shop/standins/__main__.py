"""Start the three stand-ins in one process: `python -m examples.shop.standins --directory DIR`.

Invariant: the one line of JSON with their URLs is printed when all three take connections.
Read next: wire.py.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from pathlib import Path

from examples.shop.standins.smtp import MailServer
from examples.shop.standins.stripe import Stripe
from examples.shop.standins.twilio import Twilio
from examples.shop.standins.wire import HttpSite, run, say, stop_event


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Stand-ins of Stripe, Twilio and a mail server.")
    parser.add_argument("--directory", type=Path, default=Path(), help="where the ledgers are kept")
    for name in ("stripe", "twilio", "smtp"):
        parser.add_argument(f"--{name}-port", type=int, default=0, help="0 lets the system choose")
    parser.add_argument("--authorisation-seconds", type=float, default=0.0, help="how long the card network takes")
    options = parser.parse_args()
    options.directory.mkdir(parents=True, exist_ok=True)
    return options


async def _main() -> None:
    options = _options()
    directory: Path = options.directory
    files = {name: str(directory / f"{name}-ledger.db") for name in ("stripe", "twilio", "smtp")}
    stop = stop_event()
    charges = Stripe(files["stripe"], authorisation_s=options.authorisation_seconds)
    stripe = HttpSite(charges.answer, options.stripe_port)
    twilio = HttpSite(Twilio(files["twilio"]).answer, options.twilio_port)
    mail, mail_url = await MailServer(files["smtp"]).listen(options.smtp_port)
    # The HTTP sockets listen already: a connection made now waits in the backlog until `serve`
    # takes it.
    say(
        json.dumps(
            {
                "STRIPE_API_BASE": stripe.url,
                "TWILIO_API_BASE": twilio.url,
                "SMTP_URL": mail_url,
                "ledgers": files,
            }
        )
    )
    await asyncio.gather(stripe.serve(stop), twilio.serve(stop))
    mail.close()


if __name__ == "__main__":
    run(_main)
