"""fairseq's checkpoints: loading them under torch's weights_only default."""

import argparse

import torch


def allow_fairseq_checkpoints() -> None:
    """Let torch.load(weights_only=True) read what fairseq's checkpoints hold beside tensors: the model's arguments."""
    if hasattr(torch.serialization, "add_safe_globals"):  # torch < 2.4 has no allow-list
        torch.serialization.add_safe_globals([argparse.Namespace])
