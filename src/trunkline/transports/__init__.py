"""Transports: one module each, found by entry point."""
