"""Stores: one module each, found by entry point."""
