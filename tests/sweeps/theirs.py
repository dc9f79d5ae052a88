"""A checkpoint as microsoft/SparseMixer's example writes it, made from one of ours: `convert` the other way."""

import argparse
from pathlib import Path

import torch

from fairseq_sparsemixer.plugin.checkpoints.converting import EXPERTS, _their_names

FLAGS = ["--moe-freq", "2", "--router", "sparsemixer", "--router-bias"]  # what ours is to be trained with


def write_theirs(ours: Path, path: Path, num_experts: int = 4) -> None:
    """Weights and arguments alone: it has no optimizer's state."""
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
