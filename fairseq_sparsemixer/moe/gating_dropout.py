"""Gating dropout (Liu et al., 2022; arXiv 2205.14336): the tokens of some batches stay on their rank, without all-to-all.

With probability P, the experts of a training batch are the local ones. As in fairseq's branch nllb, the gate then decides as
always, and the expert e that it chose is replaced by the local expert that has e's place on its own rank: of E experts on
G ranks, L = E / G on each, e becomes e mod L. Combine weights, capacity and auxiliary losses are those of e.

    y = sum_i w_i f_{r L + e_i mod L}(x)        for a token of rank r with the choices e_i and their combine weights w_i

Every rank must decide alike, or one would wait for another in an all-to-all. So the coin is drawn from numbers that all ranks
know, not from their random states, and costs no communication. It is the same for all layers of the model, as in the paper.
"""

import random
from dataclasses import replace

from fairseq_sparsemixer.moe.gates.gate import Gate, require_probability
from fairseq_sparsemixer.moe.gates.routing import Routing


def require_local_routing(gate: Gate, probability: float) -> None:
    """Raise ValueError for a probability outside [0, 1), or a gate that keeps numbers of every expert's outputs."""
    if require_probability("gating_dropout", probability, "always exchanges tokens") and gate.has_defaults:
        raise ValueError(
            f"gating_dropout={probability} does not work with router={gate.router}, which would average the outputs of"
            " different experts; leave it out, or choose another router"
        )


def stays_on_rank(probability: float, seed: int, update: int, batch: int) -> bool:
    """The coin of a training batch: the batch-th of an update. Equal on every rank that passes the same numbers."""
    return random.Random(f"gating dropout {seed} {update} {batch}").random() < probability


def to_local_experts(routing: Routing, num_local: int) -> Routing:
    """The routing among the num_local experts of this rank, numbered from 0: e becomes e mod num_local."""
    return replace(routing, expert_index=routing.expert_index % num_local, probabilities=routing.probabilities[:, :num_local])
