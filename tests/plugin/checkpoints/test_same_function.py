"""Which settings two models must share to compute the same: compared with the outputs of gates and layers themselves."""

from argparse import Namespace

import pytest
import torch

from fairseq_sparsemixer.moe.gates import GATES, build_gate
from fairseq_sparsemixer.options import MoEOptions
from fairseq_sparsemixer.plugin.checkpoints.same_function import difference
from fairseq_sparsemixer.plugin.models.architectures import fill_defaults
from fairseq_sparsemixer.plugin.models.router_options import router_options


def state(**settings):
    return {"cfg": {"model": Namespace(arch="transformer_moe", **settings)}}


# For each router: pairs of flags.
PAIRS = [
    *(("switch", {"capacity_factor": value}, {}) for value in (0.3, 1.5)),
    ("switch", {"eval_capacity_factor": 0.5}, {}),
    ("switch", {"eval_capacity_factor": 0.5}, {"eval_capacity_factor": 0.3}),
    ("switch", {"eval_capacity_factor": float("inf")}, {}),
    ("switch", {"capacity_policy": "probability", "capacity_factor": 1.0}, {}),
    ("switch", {"capacity_policy": "probability", "eval_capacity_factor": 0.5}, {"eval_capacity_factor": 0.5}),
    ("switch", {"capacity_policy": "position", "eval_capacity_factor": 0.5}, {"eval_capacity_factor": 0.5}),
    ("switch", {"jitter_eps": 0.3}, {}),
    ("switch", {"moe_bias_update_rate": 0.1}, {"moe_bias_update_rate": 0.2}),
    ("sparsemixer", {"jitter_eps": 0.01}, {}),
    ("sparsemixer", {"gradient_estimator": "heun3"}, {}),
    ("sparsemixer", {"estimator_at_argmax": True}, {}),
    ("sparsemixer", {"router_option": "sampled=false"}, {}),
    ("sparsemixer_v2", {"jitter_eps": 0.01}, {}),
    ("sparsemixer_v2", {"moe_top_k": 2}, {}),
    ("sparsemixer_v2", {"moe_top_k": 1}, {}),
    ("gshard", {"capacity_factor": 0.5}, {}),
    ("gshard", {"second_expert_policy": "random"}, {}),
    ("gshard", {"normalise_before_dropping": True}, {}),
    ("gshard", {"normalise_before_dropping": True, "eval_capacity_factor": 0.5}, {"eval_capacity_factor": 0.5}),
    ("expert_choice", {"capacity_factor": 1.0}, {}),
    ("expert_choice", {"capacity_factor": 2.0}, {}),
    ("round_robin", {"capacity_factor": 0.5}, {}),
    ("round_robin", {"moe_top_k": 2}, {}),
    ("topk", {"router_score": "sigmoid"}, {}),
    ("topk", {"router_score": "softmax"}, {}),
    ("topk", {"router_weights": "raw"}, {}),
    ("topk", {"router_scale": 2.0}, {}),
    ("topk", {"router_groups": 4, "router_topk_groups": 2}, {}),
    ("dense_st", {"router_option": "renormalise=true"}, {}),
    ("default_moe", {"router_option": "default_decay=0.5"}, {}),
    ("expert_threshold", {"router_option": "threshold_decay=0.5,warmup_updates=1"}, {}),
    ("expert_threshold", {"moe_top_k": 2}, {}),
    ("remoe", {"router_option": "l1_coefficient=0.1,l1_multiplier=1.5"}, {}),
    ("remoe", {"moe_top_k": 4}, {}),
    ("sinkhorn", {"moe_top_k": 2}, {}),
    ("hash", {"capacity_factor": 0.5}, {}),
    ("noisy_topk", {"moe_top_k": 3}, {}),
]


def routed(router, flags):
    """What a gate of these flags does in evaluation: its weight for each expert [S, E], from a state that all flags share."""
    torch.manual_seed(2)
    cfg = Namespace(router=router, **flags)
    fill_defaults(cfg, MoEOptions)
    gate = build_gate(router, 6, 8, **router_options(cfg)).eval()
    drawn = torch.Generator().manual_seed(3)
    gate.load_state_dict({name: torch.randn(v.shape, generator=drawn).to(v.dtype) for name, v in gate.state_dict().items()})
    known = {"token_ids": torch.arange(40)} if gate.wants_token_ids else {}
    routing = gate(torch.randn(40, 6, generator=drawn), **known)
    return torch.zeros(40, 8).scatter_add_(1, routing.expert_index, routing.combine_weight.float())


@pytest.mark.parametrize("router, one, other", PAIRS, ids=[f"{r}-{a}-{b}" for r, a, b in PAIRS])
def test_settings_differ_exactly_if_the_gates_route_differently(router, one, other):
    same = torch.equal(routed(router, one), routed(router, other))
    found = difference(state(router=router, **one), state(router=router, **other))
    assert (found is None) == same, found


def test_every_router_with_options_is_in_the_pairs():
    own = {name for name, gate in GATES.items() if gate.__module__.startswith("fairseq_sparsemixer.")}  # not of other tests
    assert {router for router, _, _ in PAIRS} == own - {"base"}


SENTENCES = [
    (dict(eval_capacity_factor=2.0), {}, "--eval-capacity-factor is None, not 2.0"),
    (dict(moe_eom=0.2), dict(moe_eom=0.0), "--moe-eom is 0.0, not 0.2"),
    (dict(moe_fom=0.2), {}, "--moe-fom is 0.0, not 0.2"),
    (dict(expert_activation="gelu"), {}, "--expert-activation is 'relu', not 'gelu'"),
    (dict(expert_lora_rank=4, expert_lora_alpha=8.0), dict(expert_lora_rank=4), "--expert-lora-alpha is 1.0, not 2.0"),
    (dict(encoder_attention_heads=4), dict(encoder_attention_heads=8), "--encoder-attention-heads is 8, not 4"),
    (dict(encoder={"learned_pos": True}), dict(encoder={"learned_pos": False}), "--encoder-learned-pos is False, not True"),
]  # fmt: skip


@pytest.mark.parametrize("one, other, sentence", SENTENCES)
def test_the_flag_and_both_values_are_named(one, other, sentence):
    common = dict(router="switch", activation_fn="relu")
    assert difference(state(**common, **one), state(**common, **other)) == sentence


SAME = [
    (dict(expert_activation="relu"), {}),
    (dict(expert_lora_rank=4), dict(expert_lora_rank=4, expert_lora_alpha=4.0)),
    (dict(moe_gating_dropout=0.1, moe_cmr_gate_dropout=0.1, expert_dropout=0.1, checkpoint_experts=True, moe_overlap=2), {}),
    (dict(moe_hierarchical_exchange=8), {}),
    (dict(dropout=0.1, freeze="gate", expert_parallel_size=2, balance_scope="global", force_expert_choice=True), {}),
]


@pytest.mark.parametrize("one, other", SAME)
def test_settings_of_training_may_differ(one, other):
    common = dict(router="switch", activation_fn="relu")
    assert difference(state(**common, **one), state(**common, **other)) is None


def test_a_router_that_is_not_installed_is_compared_by_all_its_flags():
    known = dict(router="of_another_package")
    assert difference(state(**known), state(**known, estimator_at_argmax=True)) is None
    assert difference(state(**known, jitter_eps=0.2), state(**known)) == "--jitter-eps is 0.1, not 0.2"
    assert difference(state(**known, router_option="a=1"), state(**known)) == "--router-option is None, not 'a=1'"
