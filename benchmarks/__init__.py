"""Benchmarks; run them from the repository's root as `python -m benchmarks.layer`, and see README.md here."""
