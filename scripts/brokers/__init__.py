"""Real message brokers on loopback, for tests, the demo and benchmarks.

Standard library only: it runs before .venv exists (except for NATS, whose binary comes with .venv).
Read next: __main__.py (the commands), lifecycle.py (what they do), kind.py (what a broker must say of itself).
"""
