"""The shop's way to the outside: Stripe, Twilio and SMTP through their own client libraries.

Invariant: every effect carries an id of its message, so asking twice has one effect.
Read next: stripe.py, twilio.py, mail.py; settings.py names what the environment must hold.
"""
