"""Refuses experts that cannot fit into this machine's memory, before they are allocated.

A model is built whole on the CPU of every rank, before its experts are sharded over ranks or moved to a device.
"""

import os
from pathlib import Path
from typing import Any, Dict

import torch

from fairseq_sparsemixer.errors import ConfigurationError
from fairseq_sparsemixer.moe.experts import GATED_ACTIVATIONS
from fairseq_sparsemixer.plugin.models.layer_choice import STACKS, experts_in_layer, given, stack_option

GIB = 2**30


def refuse_too_many_experts(cfg: Any, layers: Dict[str, int]) -> None:
    """Raise ConfigurationError if the experts' parameters, in torch's default type, are larger than RAM and swap together.

    layers: the number of layers of each stack. Does nothing where the memory is unknown, and on the meta device.
    """
    there = machine_memory()
    wanted = expert_bytes(cfg, layers)
    if not there or wanted <= there or torch.empty(0).is_meta:
        return
    flags = [f"--{stack}-moe-layers {given(cfg, stack)}" for stack in STACKS if stack in layers and given(cfg, stack)]
    raise ConfigurationError(
        f"--num-experts {cfg.num_experts}{' with ' if flags else ''}{' '.join(flags)} takes {wanted / GIB:,.1f} GiB for the"
        f" parameters of experts, and this machine has {there / GIB:,.1f} GiB of memory with swap; give fewer or smaller experts"
    )


def expert_bytes(cfg: Any, layers: Dict[str, int]) -> int:
    """The size of the routed experts' weights and biases. Sizes that cfg does not have, as in upcycling, count as 1."""
    total = 0
    for stack, count in layers.items():
        model_dim = stack_option(cfg, stack, "embed_dim") or 1
        hidden_dim = cfg.expert_ffn_embed_dim or stack_option(cfg, stack, "ffn_embed_dim") or 1
        inner = hidden_dim * (2 if cfg.expert_activation in GATED_ACTIVATIONS else 1)
        numbers = model_dim * inner + inner + hidden_dim * model_dim + model_dim
        total += numbers * sum(experts_in_layer(cfg, stack, index, count) for index in range(count))
    return total * torch.get_default_dtype().itemsize


def machine_memory(meminfo: Path = Path("/proc/meminfo")) -> int:
    """Bytes of RAM and swap; 0 if the system does not say. A container's limit is not known here."""
    try:
        lines = dict(line.split(":", 1) for line in meminfo.read_text(encoding="ascii").splitlines() if ":" in line)
        return sum(int(lines[name].split()[0]) * 1024 for name in ("MemTotal", "SwapTotal"))
    except (OSError, ValueError, KeyError, IndexError):
        pass
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return 0
