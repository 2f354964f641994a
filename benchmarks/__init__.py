"""Every figure the documentation quotes, reproducible with one command: `python -m benchmarks`.

Read next: docs/explanation/performance.md, then cases.py.
"""
