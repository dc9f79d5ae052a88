"""The parts of SparseMixer: a router with each part switchable, the study's design, and the estimated effects."""

import itertools
import json
import math
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from fairseq.utils import import_user_module

import recipes.multilingual
from fairseq_sparsemixer import build_gate
from fairseq_sparsemixer.errors import ConfigurationError
from fairseq_sparsemixer.moe.gates.sparsemixer import mask_unlikely
from fairseq_sparsemixer.moe.gates.step_state import update_step_states
from recipes.multilingual import effects as effects_module
from recipes.multilingual.effects import PARTS, fit, parts_of
from recipes.multilingual.effects import effects as effects_of

FOLDER = Path(recipes.multilingual.__file__).parent
SWITCH = dict(sampled=False, jitter_eps=math.inf, gain=1, coin=False, scale=False, balance="whole")


@pytest.fixture(scope="module", autouse=True)
def user_dir():
    """The study's user-dir, imported as by fairseq."""
    import_user_module(Namespace(user_dir=str(FOLDER / "sparsemixer_parts")))


def routed(router, **options):
    """(routing, gradient of the tokens) of one training pass with fixed seeds."""
    torch.manual_seed(0)
    gate = build_gate(router, 8, 6, **options).train()
    torch.manual_seed(1)
    tokens = torch.randn(60, 8, requires_grad=True)
    upstream = torch.randn(60, 1)
    routing = gate(tokens)
    (gradient,) = torch.autograd.grad((routing.combine_weight * upstream).sum() + routing.aux_losses["balance"], tokens)
    return routing, gradient


@pytest.mark.parametrize("router, own, parts", [
    ("sparsemixer", {}, {}),
    ("sparsemixer", {"gradient_estimator": "euler"}, {"coin": False}),
    ("sparsemixer", {"jitter_eps": 0.5}, {"jitter_eps": 0.5}),
    ("sparsemixer", {"sampled": False, "scaled": False}, {"sampled": False, "scale": False}),
    ("sparsemixer", {"sampled": False, "gradient_estimator": "switch"}, {"sampled": False, "gain": 1}),
    ("switch", {"jitter_eps": 0.0}, SWITCH),
    ("switch", {"jitter_eps": 0.1}, {**SWITCH, "noise": 0.1}),
])  # fmt: skip
def test_with_all_parts_the_router_is_sparsemixer_and_without_any_switch(router, own, parts):
    theirs, their_gradient = routed(router, **own)
    ours, our_gradient = routed("sparsemixer_parts", **parts)
    assert torch.equal(theirs.expert_index, ours.expert_index)
    torch.testing.assert_close(theirs.combine_weight, ours.combine_weight)
    torch.testing.assert_close(their_gradient, our_gradient)
    assert (theirs.output_scale is None) == (ours.output_scale is None)


def test_a_value_of_one_leaves_the_gradient_of_p():
    plain, one = routed("sparsemixer_parts", **SWITCH), routed("sparsemixer_parts", **SWITCH, value="one")
    torch.testing.assert_close(one[0].combine_weight, torch.ones(60, 1))
    torch.testing.assert_close(one[1], plain[1])


def test_a_scaled_value_is_e_times_p_in_value_and_gradient():
    plain, scaled = routed("sparsemixer_parts", **SWITCH), routed("sparsemixer_parts", **SWITCH, value="scaled")
    torch.testing.assert_close(scaled[0].combine_weight, 6 * plain[0].combine_weight)


def test_a_share_of_the_coin_halves_that_share_of_the_samples():
    gate = build_gate("sparsemixer_parts", 8, 6, jitter_eps=math.inf, scale=False, coin=0.5).train()
    tokens = torch.randn(20_000, 8)
    torch.manual_seed(2)
    routing = gate(tokens)
    whole = routing.probabilities.gather(1, routing.expert_index)
    other = routing.expert_index.squeeze(1) != routing.probabilities.argmax(-1)
    node = (routing.combine_weight / whole).squeeze(1).detach()
    torch.testing.assert_close(node[~other], torch.ones_like(node[~other]))
    assert (node[other] - 0.5).abs().lt(1e-3).float().mean() == pytest.approx(0.25, abs=0.02)  # half of half of them


@pytest.mark.parametrize("option, widths", [
    ("widened_by", [0.1, 0.1 / 0.75, 0.2, 0.4, math.inf, math.inf]),
    ("narrowed_by", [math.inf, 0.4, 0.2, 0.1 / 0.75, 0.1, 0.1]),
])  # fmt: skip
def test_the_mask_changes_its_width_in_n_updates(option, widths):
    gate = build_gate("sparsemixer_parts", 8, 6, sampled=False, **{option: 4}).train()
    for expected in widths:
        logits = torch.randn(60, 6, requires_grad=True)
        weight = gate.decide(logits).combine_weight
        torch.testing.assert_close(weight.squeeze(1), mask_unlikely(logits, expected).softmax(-1).amax(-1))
        weight.sum().backward()
        update_step_states(gate)
    assert "width.updates" in gate.state_dict()
    assert not any("width" in name for name in build_gate("sparsemixer_parts", 8, 6).state_dict())


def test_a_mask_cannot_widen_and_narrow():
    with pytest.raises(ValueError, match="widened_by=4, narrowed_by=2"):
        build_gate("sparsemixer_parts", 8, 6, widened_by=4, narrowed_by=2)


def test_an_unknown_choice_is_refused():
    with pytest.raises(ValueError, match="value=two must be one of p, scaled, one"):
        build_gate("sparsemixer_parts", 4, 2, value="two")


class Spec:
    """The committed study, without its data."""

    def __init__(self):
        content = yaml.safe_load((FOLDER / "study_parts.yaml").read_text())
        self.flags = {"router": "sparsemixer_parts"}
        self.routers = content["variants"]


def plan():
    """[16, 8] of -1 and 1: the settings of the eight parts in each variant, even if a part has no effect there."""
    rows = []
    for flags in Spec().routers.values():
        if "router-option" in flags:
            options = dict(pair.split("=") for pair in flags["router-option"].split(","))
            on = [
                options["sampled"] == "1", flags["jitter-eps"] != "inf", options["value"] == "one", options["gain"] == "2",
                options["coin"] == "1", options["scale"] == "1", options["balance"] == "masked", options["noise"] != "0",
            ]  # fmt: skip
            rows.append([1 if part else -1 for part in on])
    return np.array(rows)


def test_the_design_is_orthogonal_with_resolution_four():
    design = plan()
    assert design.shape == (16, 8)
    assert np.array_equal(design.T @ design, 16 * np.eye(8))
    for a, b in itertools.combinations(range(8), 2):
        assert not (design.T @ (design[:, a] * design[:, b])).any()  # no part is confounded with a two-part interaction


def test_the_letters_of_a_variant_name_its_parts():
    names = [name for name, flags in Spec().routers.items() if "router-option" in flags]
    for name, row in zip(names, plan()):
        assert "".join(letter for letter, on in zip("SMVGCWBN", row) if on > 0) == name.replace("none", "")


def test_the_coin_counts_where_experts_are_sampled_and_the_balance_where_there_is_a_mask():
    spec = Spec()
    assert parts_of(spec, "VCBN")["coin"] is False and parts_of(spec, "VCBN")["balance"] is False
    assert parts_of(spec, "SMVC")["coin"] is True and parts_of(spec, "MGCB")["balance"] is True
    assert parts_of(spec, "switch") is None


def test_effects_are_recovered_from_losses_generated_with_them():
    spec = Spec()
    truth = dict(zip(PARTS, (-0.1, 0.05, -0.2, 0.01, 0.03, 0.0, 0.07, -0.02)))
    runs = []
    for seed, level in ((1, 2.0), (2, 2.5)):
        for variant in spec.routers:
            parts = parts_of(spec, variant)
            if parts:
                loss = level + sum(truth[part] for part, on in parts.items() if on)
                runs.append({"router": variant, "seed": seed, "curve": {"updates": [50, 100], "losses": [9.0, loss]}})
    for effect in effects_of(spec, runs, 100):
        assert effect.mean == pytest.approx(truth[effect.part], abs=1e-9)
        assert effect.high - effect.low == pytest.approx(0, abs=1e-9)


def test_runs_of_other_machines_are_added_and_none_is_counted_twice(tmp_path, monkeypatch):
    here, there = ([{"run": f"{name}-e8-seed{seed}", "router": name} for name in names] for seed, names in (
        (1, ("MGCB", "switch")), (2, ("MGCB", "unknown")),
    ))  # fmt: skip
    monkeypatch.setattr(effects_module, "gather", lambda study, out: {"runs": here})
    (tmp_path / "results.json").write_text(json.dumps({"runs": [{**here[0], "loss": 9}, *there]}))
    found = effects_module.all_runs(Spec(), tmp_path, [tmp_path / "results.json"])
    assert found == [here[0], there[0]]


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"runs": 3}', '{"runs": [3]}'])
def test_other_results_must_be_a_studys(tmp_path, monkeypatch, content):
    monkeypatch.setattr(effects_module, "gather", lambda study, out: {"runs": []})
    (tmp_path / "other.json").write_text(content)
    with pytest.raises(ConfigurationError, match="--more .*other.json is not the results.json of a study"):
        effects_module.all_runs(Spec(), tmp_path, [tmp_path / "other.json"])


def test_the_interval_is_the_pooled_two_sample_t_interval():
    without, having = [1.0, 1.2, 1.1, 1.5], [0.8, 0.9, 1.1]
    design = np.array([[1.0, 0.0]] * 4 + [[1.0, 1.0]] * 3)
    _, (mean, low, high) = fit(design, np.array(without + having))
    pooled = (sum((x - 1.2) ** 2 for x in without) + sum((x - 14 / 15) ** 2 for x in having)) / 5
    half = 2.570581836 * math.sqrt(pooled * (1 / 4 + 1 / 3))  # Student's t, 5 degrees of freedom
    assert mean == pytest.approx(14 / 15 - 1.2)
    assert (low, high) == (pytest.approx(mean - half), pytest.approx(mean + half))
