"""Experiments from raw text to results: `python -m recipes.NAME prepare|train|evaluate`; see docs/recipes.md."""
