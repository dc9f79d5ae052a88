"""Makes a checkpoint in the format of microsoft/SparseMixer's example from one of ours: the inverse of `convert`."""

import argparse
from pathlib import Path

import torch

from fairseq_sparsemixer.plugin.checkpoints.converting import EXPERTS, _their_names

FLAGS = ["--moe-freq", "2", "--router", "sparsemixer", "--router-bias"]  # flags for training our checkpoint


def write_theirs(ours: Path, path: Path, num_experts: int = 4) -> None:
    """Write weights and arguments, without optimizer state."""
    state = torch.load(ours, weights_only=True)
    model = {}
    for name, value in state["model"].items():
        for expert, their_name in enumerate(_their_names(name, num_experts)):
            model[their_name] = value[expert].t().clone() if EXPERTS in name else value
    arguments = {
        **vars(state["cfg"]["model"]),
        "arch": "switch_transformer",
        "_name": "switch_transformer",
        "router": "SparseMixer",
    }
    cfg = {**state["cfg"], "model": argparse.Namespace(**arguments)}
    torch.save({"args": None, "cfg": cfg, "model": model, "optimizer_history": [], "extra_state": {}, "task_state": {}}, path)
