"""Stand-ins of Stripe, Twilio and a mail server, as real servers on loopback.

Invariant: what a stand-in has answered is in its own database file, so a `kill -9` loses nothing
and an audit reads the truth there without asking the server.
Read next: stripe.py, twilio.py, smtp.py; wire.py serves them, ledger.py keeps their files.

`python -m examples.shop.standins` starts all three in one process; `python -m
examples.shop.standins.stripe` one.
"""
