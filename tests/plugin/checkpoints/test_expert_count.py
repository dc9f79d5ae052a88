"""Another number of experts: E -> E' computes the same in float64 where copies can, and says so where they cannot."""

from argparse import Namespace

import pytest
import torch

from fairseq_sparsemixer.errors import ConfigurationError
from fairseq_sparsemixer.moe.layer import build_moe_layer
from fairseq_sparsemixer.options import MoEOptions
from fairseq_sparsemixer.plugin.checkpoints.expert_count import change_experts
from fairseq_sparsemixer.plugin.checkpoints.slices import Change
from fairseq_sparsemixer.plugin.models.router_options import router_options

M, H, LAYER = 5, 7, "encoder.layers.1.fc1.moe."


def layer_of(options: MoEOptions):
    activation = options.expert_activation or "relu"
    return build_moe_layer(options.router, M, H, options.num_experts, activation, **router_options(options)).double().eval()


def trained(**flags):
    """(flags, layer, checkpoint) of a layer whose parameters and gate state are random."""
    options = MoEOptions(**flags)
    layer = layer_of(options)
    for name, value in layer.state_dict().items():
        if name.startswith("gate.") and value.dim():
            value.normal_()
    weights = {LAYER + name: value for name, value in layer.state_dict().items()}
    state = {"model": weights, "cfg": {"model": Namespace(**vars(options), arch="transformer_moe")}, "last_optimizer_state": {}}
    return options, layer, state


def changed(state, change=Change(), **flags):
    """(layer, notes) with the new flags."""
    done = change_experts(state, MoEOptions(**flags), change)
    options = done.state["cfg"]["model"]
    layer = layer_of(MoEOptions(**{name: getattr(options, name) for name in vars(MoEOptions())}))
    layer.load_state_dict({name[len(LAYER) :]: value for name, value in done.state["model"].items()})
    assert "last_optimizer_state" not in done.state
    return layer, done.notes


SAME = {  # flags of the old model, and of the new one
    "top-1": (dict(router="switch", num_experts=4), dict(num_experts=8)),
    "three copies": (dict(router="switch", num_experts=4), dict(num_experts=12)),
    "omega": (dict(router="sparsemixer", num_experts=4), dict(num_experts=8)),
    "a bias of the router": (dict(router="switch", num_experts=4, router_bias=True), dict(num_experts=8)),
    "a selection bias": (dict(router="switch", num_experts=4, moe_bias_update_rate=0.1), dict(num_experts=8)),
    "twice the experts a token": (dict(router="topk", num_experts=4, moe_top_k=2), dict(num_experts=8, moe_top_k=4)),
    "raw weights": (dict(router="topk", num_experts=4, moe_top_k=2, router_weights="raw"), dict(num_experts=8, moe_top_k=4)),
    "relu weights": (dict(router="remoe", num_experts=4), dict(num_experts=8)),
}


@pytest.mark.parametrize("case", SAME)
def test_copies_compute_the_same(case):
    before, after = SAME[case]
    _, old, state = trained(**before)
    x = torch.randn(60, M, dtype=torch.float64)
    with torch.no_grad():
        expected = old(x)
        layer, notes = changed(state, **after)
        found = layer(x)
    assert notes == []
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)  # router rows of copies differ by a millionth
    used = layer.routing.expert_index[layer.routing.combine_weight > 0].unique()
    assert len(used) > before["num_experts"], "tokens spread over the copies"


def test_hashed_tokens_go_to_copies_of_their_expert():
    _, old, state = trained(router="hash", num_experts=4)
    ids, x = torch.arange(60), torch.randn(60, M, dtype=torch.float64)
    layer, notes = changed(state, num_experts=8)
    assert notes == []
    torch.testing.assert_close(layer(x, token_ids=ids), old(x, token_ids=ids), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "before, after",
    [
        (dict(router="switch", num_experts=4), dict(num_experts=2)),
        (dict(router="switch", num_experts=4), dict(num_experts=6)),
        (dict(router="topk", num_experts=4, moe_top_k=2), dict(num_experts=8)),
        (dict(router="default_moe", num_experts=4), dict(num_experts=8)),
    ],
    ids=["fewer", "uneven copies", "two copies of one expert", "default outputs"],
)
def test_a_layer_that_computes_something_else_is_named(before, after):
    _, _, state = trained(**before)
    assert changed(state, **after)[1] == [
        "encoder.layers.1 does not compute the same: a token gets other experts or weights than before"
    ]


def test_experts_and_their_rows_move_together():
    _, old, state = trained(router="topk", num_experts=4)
    layer, _ = changed(state, num_experts=6)
    origins = [0, 0, 1, 2, 2, 3]
    torch.testing.assert_close(layer.gate.projection.weight, old.gate.projection.weight[origins], rtol=1e-4, atol=1e-4)
    assert torch.equal(layer.experts.weight_in, old.experts.weight_in[origins])
    fewer, _ = changed(state, num_experts=2)
    assert torch.equal(fewer.experts.weight_out, old.experts.weight_out[[0, 2]])
    assert torch.equal(fewer.gate.projection.weight, old.gate.projection.weight[[0, 2]])


def test_only_second_copies_get_noise_and_new_hidden_units():
    _, old, state = trained(router="topk", num_experts=4, moe_top_k=2)
    layer, _ = changed(state, Change(noise=0.1), num_experts=8, moe_top_k=4)
    drawn, _ = changed(state, Change(reinitialised=0.5), num_experts=8, moe_top_k=4)
    for made in (layer, drawn):
        assert torch.equal(made.experts.weight_in[::2], old.experts.weight_in)
        assert all(not torch.equal(copy, whole) for copy, whole in zip(made.experts.weight_in[1::2], old.experts.weight_in))
    redrawn = (drawn.experts.bias_in[1::2] != old.experts.bias_in).sum(1)
    assert redrawn.tolist() == [H // 2] * 4


def test_new_hidden_units_of_gated_experts_are_new_on_both_sides_of_the_product():
    _, _, state = trained(router="topk", num_experts=2, expert_activation="swiglu")
    experts = {name.split(".experts.")[1]: value for name, value in state["model"].items() if ".experts." in name}
    made = change_experts(state, MoEOptions(num_experts=4), Change(reinitialised=0.5)).state["model"]
    for copy, whole in ((1, 0), (3, 1)):
        same = made[f"{LAYER}experts.bias_in"][copy] == experts["bias_in"][whole]  # [2 H]
        assert torch.equal(same[:H], same[H:]) and same.sum() == 2 * (H - H // 2)
        kept_out = (made[f"{LAYER}experts.weight_out"][copy] == experts["weight_out"][whole]).all(-1)
        assert torch.equal(kept_out, same[:H])


def test_layers_with_their_own_number_of_experts_keep_it():
    _, _, state = trained(router="switch", num_experts=4)
    other = layer_of(MoEOptions(router="switch", num_experts=3))
    state["model"].update({f"decoder.layers.0.fc1.moe.{name}": value for name, value in other.state_dict().items()})
    done = change_experts(state, MoEOptions(num_experts=8), Change())
    assert done.state["model"]["decoder.layers.0.fc1.moe.experts.weight_in"].size(0) == 3
    assert done.state["model"][f"{LAYER}experts.weight_in"].size(0) == 8


def with_own_number(number, **flags):
    """A checkpoint whose decoder layer has its own number of experts."""
    _, _, state = trained(**flags)
    other = layer_of(MoEOptions(**{**flags, "num_experts": number}))
    state["model"].update({f"decoder.layers.0.fc1.moe.{name}": value for name, value in other.state_dict().items()})
    return state


def test_another_k_is_also_that_of_layers_with_their_own_number_of_experts():
    flags = dict(router="topk", num_experts=4, moe_top_k=2)
    done = change_experts(with_own_number(6, **flags), MoEOptions(num_experts=8, moe_top_k=4), Change())
    assert done.notes == ["decoder.layers.0 keeps its 6 experts, of which a token gets 4: another number"]
    with pytest.raises(ConfigurationError, match="--moe-top-k 4 must lie between 1 and --num-experts 3"):
        change_experts(with_own_number(3, **flags), MoEOptions(num_experts=8, moe_top_k=4), Change())


@pytest.mark.parametrize(
    "before, after, sentence",
    [
        (dict(router="switch"), dict(num_experts=-3), "--num-experts -3 must be at least 1"),
        (dict(router="switch"), dict(num_experts=0), "--num-experts 0 must be at least 1"),
        (dict(router="topk", moe_top_k=2), dict(num_experts=1), "--moe-top-k 2 must lie between 1 and --num-experts 1"),
        (dict(router="topk", router_groups=2), dict(num_experts=7), "--router-groups 2 must divide --num-experts 7"),
        (dict(router="gshard"), dict(num_experts=1), "--router gshard gives each token two experts; --num-experts 1 must"),
    ],
)
def test_numbers_that_the_router_does_not_allow_are_refused(before, after, sentence):
    _, _, state = trained(num_experts=4, **before)
    with pytest.raises(ConfigurationError, match=sentence):
        change_experts(state, MoEOptions(**after), Change())


def test_a_model_without_a_layer_of_the_common_number_is_refused():
    _, _, state = trained(router="switch", num_experts=4)
    state["cfg"]["model"].num_experts = 6
    with pytest.raises(ConfigurationError, match=r"layers have their own numbers of experts \(4\), which upcycle keeps"):
        change_experts(state, MoEOptions(num_experts=8), Change())


def test_a_shard_is_refused():
    _, _, state = trained(router="switch", num_experts=4)
    state["expert_parallel"] = {"size": 2, "index": 0}
    with pytest.raises(ConfigurationError, match="one file of a sharded one; make one file: fairseq-sparsemixer reshard"):
        change_experts(state, MoEOptions(num_experts=8), Change())
