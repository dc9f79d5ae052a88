"""What recipes share: downloads, corpora, text, training and evaluation, the command line."""
