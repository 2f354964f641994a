"""Policies: pure decisions about failures and load. Each returns a verdict; delivery.py acts on it."""
