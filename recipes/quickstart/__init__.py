"""The quickstart: see __main__.py."""
