"""Experiments from raw text to figures: `python -m recipes.NAME prepare|train|evaluate`; see docs/recipes.md."""
