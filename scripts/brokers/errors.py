"""What goes wrong with a broker."""


class BrokerError(Exception):
    """A broker cannot be installed, started or found; the text says what to do."""


class MissingError(BrokerError):
    """Something a broker needs is not installed and may not be, or cannot be, installed from here."""
