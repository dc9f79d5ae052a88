"""Code shared by the recipes: downloads, corpora, text processing, training, evaluation, command line."""
