"""The registry of routers."""

import pytest

from fairseq_sparsemixer import build_gate
from fairseq_sparsemixer.moe.gates import GATES, gate_class, gate_options, register_gate
from fairseq_sparsemixer.moe.gates.gate import Gate


def test_an_unknown_router_lists_the_known_ones():
    with pytest.raises(ValueError, match="router=swich is unknown; choose from dense, .*sparsemixer, .*switch"):
        build_gate("swich", model_dim=4, num_experts=2)


def test_an_unknown_option_lists_those_of_the_router():
    with pytest.raises(ValueError, match="router switch takes no option top_k; it takes jitter_eps"):
        build_gate("switch", model_dim=4, num_experts=2, top_k=2)


def test_a_routers_options_are_its_constructors_parameters():
    assert gate_options("sparsemixer") == [
        "jitter_eps", "gradient_estimator", "estimator_at_argmax", "sampled", "scaled", "capacity_factor", "bias_update_rate",
        "router_bias", "capacity_policy", "eval_capacity_factor",
    ]  # fmt: skip


@pytest.mark.parametrize("name", sorted(GATES))
def test_every_router_builds_under_its_name(name):
    gate = build_gate(name, model_dim=4, num_experts=2)
    assert (gate.router, gate.model_dim, gate.num_experts) == (name, 4, 2)
    assert type(gate) is gate_class(name)


@pytest.mark.parametrize("name", ["switch", "dense"])
def test_a_name_can_be_registered_only_once(name):
    with pytest.raises(ValueError, match=f"a router named {name} is already registered"):
        register_gate(name)(Gate)
    assert GATES["switch"] is not Gate
