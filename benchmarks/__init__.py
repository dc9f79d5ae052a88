"""Benchmarks. Run them from the root of the repository, as in `python -m benchmarks.layer`; see README.md."""
