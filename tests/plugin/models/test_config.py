"""Checks of flags and their combinations."""

import math
import re
from argparse import Namespace
from dataclasses import fields
from typing import Optional

import pytest

from fairseq_sparsemixer.errors import ConfigurationError
from fairseq_sparsemixer.moe.gates import GATES, Gate, build_gate, register_gate
from fairseq_sparsemixer.moe.gates.switch import switch_routing
from fairseq_sparsemixer.options import MoEOptions, in_flags
from fairseq_sparsemixer.plugin.models.config import NUMBERS, check_options
from fairseq_sparsemixer.plugin.models.router_options import named_options, router_options
from fairseq_sparsemixer.plugin.models.transformer_moe import TransformerMoEConfig

LAYERS = {"encoder": 6, "decoder": 6}


@pytest.mark.parametrize("options, message", [
    (dict(router="sparsmixer"), "--router sparsmixer is unknown; choose from dense, .*sparsemixer, .*switch"),
    (dict(num_experts=0), "--num-experts 0 must be at least 1"),
    (dict(num_experts=2, router="sparsemixer_v2", moe_top_k=3), "--moe-top-k 3 must lie between 1 and --num-experts 2"),
    (dict(num_experts=2, moe_top_k=3), "--moe-top-k 3 must lie between 1 and --num-experts 2"),
    (dict(moe_top_k=2), "--moe-top-k 2 does not work with --router sparsemixer, which gives each token 1; .*noisy_topk"),
    (dict(router="gshard", moe_top_k=1), "--moe-top-k 1 does not work with --router gshard, which gives each token 2"),
    (dict(router="switch", gradient_estimator="heun3"),
     "--router switch, which does not sample.*: sparsemixer, sparsemixer_v2$"),
    (dict(router="base", capacity_factor=1.0),
     "--capacity-factor 1.0 does not work with --router base, which drops nothing; .*gshard"),
    (dict(router="dense_st", capacity_factor=1.0), "--capacity-factor 1.0 does not work with --router dense_st"),
    (dict(capacity_factor=1.0, capacity_policy="random"),
     "--capacity-policy random is unknown; choose from position, probability, batch"),
    (dict(router="switch", eval_capacity_factor=1.0),
     "--eval-capacity-factor 1.0 .* decoder must not see; leave it out, .*--force-expert-choice"),
    (dict(router="remoe", eval_capacity_factor=1.0), "--eval-capacity-factor 1.0 does not work with --router remoe"),
    (dict(router="round_robin"), "--router round_robin .* decoder must not see; .*--force-expert-choice"),
    (dict(router="gshard", second_expert_policy="none"),
     "--second-expert-policy none is unknown; choose from sampling, all, random"),
    (dict(router="topk", normalise_before_dropping=True),
     "--normalise-before-dropping True does not work with --router topk.*gshard"),
    (dict(router="hash", capacity_policy="batch"), "--capacity-policy batch does not work with --router hash"),
    (dict(capacity_factor=-1.0), "--capacity-factor -1.0 must be positive"),
    (dict(router="sinkhorn", moe_bias_update_rate=0.1), "--moe-bias-update-rate 0.1 .* whose selection takes no bias; .*switch"),
    (dict(moe_bias_update_rate=-0.1), "--moe-bias-update-rate -0.1 must be at least 0 and finite"),
    (dict(router="hash", jitter_eps=0.2), "--jitter-eps 0.2 does not work with --router hash, which has no use for it"),
    (dict(router="gshard", num_experts=1), "--num-experts 1 must be at least 2"),
    (dict(num_shared_experts=-1), "--num-shared-experts -1 must be at least 0; 0 means none"),
    (dict(expert_activation="selu"), "--expert-activation selu is unknown; choose from relu, gelu"),
    (dict(router="expert_choice"),
     "--router expert_choice .* decoder must not see; .* --moe-encoder-only .*--force-expert-choice"),
    (dict(moe_freq=0), "--moe-freq 0 must be at least 1; 2 puts experts in every second layer"),
    (dict(jitter_eps=-0.1), "--jitter-eps -0.1 must be at least 0"),
    (dict(router="switch", jitter_eps=float("inf")), "--jitter-eps inf must lie between 0 and 1"),
    (dict(router="gshard", estimator_at_argmax=True),
     "--estimator-at-argmax True does not work with --router gshard, .* sample.*: sparsemixer, sparsemixer_v2$"),
    (dict(router="base", router_bias=True), "--router-bias True .* base, whose logits take no bias; .*: .*sparsemixer, .*switch"),
    (dict(gradient_estimator="euclid"), "--gradient-estimator euclid is unknown; choose from switch, euler"),
])  # fmt: skip
def test_each_bad_option_is_named_with_its_value(options, message):
    with pytest.raises(ConfigurationError, match=message):
        check_options(MoEOptions(**options), LAYERS)


@pytest.mark.parametrize("router", ["sparsemixer", "switch", "dense"])
@pytest.mark.parametrize("flag, value", [
    *((field.name, math.nan) for field in fields(MoEOptions) if field.name in NUMBERS),
    *((name, math.inf) for name in NUMBERS if name not in ("jitter_eps", "capacity_factor")),
    *((name, -1) for name in NUMBERS), *((name, "1") for name in NUMBERS), *((name, True) for name in NUMBERS),
    ("num_experts", 2.5), ("moe_freq", 0), ("expert_dropout", 1), ("capacity_factor", 0), ("expert_parallel_size", 0),
    ("moe_hierarchical_exchange", 0),
])  # fmt: skip
def test_an_out_of_range_number_is_named_for_every_router(router, flag, value):
    options = MoEOptions(**{"router": router, flag: value})
    with pytest.raises(ConfigurationError, match=f"--{flag.replace('_', '-')} {value!r} must be "):
        check_options(options, LAYERS)


def test_every_numeric_flag_has_a_range():
    numbers = {field.name for field in fields(MoEOptions) if field.type in (int, float, Optional[int], Optional[float])}
    assert numbers == set(NUMBERS)


@pytest.mark.parametrize("flag", ["quant_noise_pq", "quant_noise_scalar"])
def test_quantization_noise_is_refused_because_it_would_not_reach_experts(flag):
    for args in (Namespace(**vars(MoEOptions()), **{flag: 0.1}), TransformerMoEConfig.from_namespace(Namespace(**{flag: 0.1}))):
        with pytest.raises(ConfigurationError, match=f"--{flag.replace('_', '-')} 0.1 adds noise .* or use --router dense"):
            check_options(args, LAYERS)
        args.router = "dense"
        check_options(args, LAYERS)


@pytest.mark.parametrize("value", [math.nan, math.inf, -0.1, 1.5])
def test_fairseqs_dropouts_used_by_experts_are_checked(value):
    with pytest.raises(ConfigurationError, match=f"--activation-dropout {value} must be at least 0 and at most 1"):
        check_options(Namespace(**vars(MoEOptions()), activation_dropout=value), LAYERS)


@pytest.mark.parametrize("options", [
    dict(), dict(router="dense"), dict(num_experts=1), dict(moe_freq=1), dict(jitter_eps=0.0), dict(moe_top_k=1),
    dict(router="gshard", moe_top_k=2), dict(router="expert_choice", force_expert_choice=True), dict(capacity_factor=1.25),
    dict(router="switch", eval_capacity_factor=2.0, force_expert_choice=True),
    dict(router="gshard", eval_capacity_factor=2.0, decoder_moe_layers="none"),
    dict(jitter_eps=float("inf")), dict(router="sparsemixer_v2", estimator_at_argmax=True),
    dict(router="dense_st", moe_bias_update_rate=0.001), dict(expert_activation="swiglu", num_shared_experts=2),
])  # fmt: skip
def test_valid_options_are_accepted(options):
    check_options(MoEOptions(**options), LAYERS)


def test_a_router_gets_the_options_it_supports_and_its_own_defaults():
    assert router_options(MoEOptions(router="switch", jitter_eps=0.2)) == {
        "jitter_eps": 0.2,
        "bias_update_rate": 0.0,
        "router_bias": False,
    }
    assert router_options(MoEOptions(gradient_estimator="inf", estimator_at_argmax=True)) == {
        "jitter_eps": 0.1, "gradient_estimator": "inf", "estimator_at_argmax": True, "bias_update_rate": 0.0,
        "router_bias": False,
    }  # fmt: skip
    assert router_options(MoEOptions(router="sparsemixer_v2", moe_top_k=2)) == {
        "top_k": 2, "jitter_eps": 0.1, "estimator_at_argmax": False, "bias_update_rate": 0.0,
        "router_bias": False,
    }  # fmt: skip


@pytest.fixture
def router_of_ones_own():
    """The name of a registered router with two options of its own."""

    class Tempered(Gate):
        def __init__(self, model_dim, num_experts, temperature=1.0, greedy=False, **balancing):
            super().__init__(model_dim, num_experts, **balancing)
            if not temperature > 0:
                raise ValueError(f"temperature={temperature} must be positive")
            self.temperature, self.greedy = temperature, greedy

        def decide(self, logits, padding_mask=None):
            return switch_routing(logits / self.temperature, padding_mask)

    register_gate("tempered")(Tempered)
    yield "tempered"
    del GATES["tempered"]


def test_router_option_sets_the_options_of_a_custom_router(router_of_ones_own, build_translation_model):
    model = build_translation_model(router=router_of_ones_own, router_option="temperature=0.5, greedy=true")
    gates = [module for module in model.modules() if isinstance(module, Gate)]
    assert gates and all((gate.temperature, gate.greedy) == (0.5, True) for gate in gates)


@pytest.mark.parametrize("given, sentence", [
    ("warmth=1", "--router-option warmth=1 does not work with --router tempered; it takes temperature, greedy"),
    ("temperature", "--router-option temperature must be NAME=VALUE"),
    ("temperature=", "--router-option temperature= must be NAME=VALUE"),
    ("temperature=1,temperature=2", "--router-option temperature=1,temperature=2 gives temperature twice"),
    ("capacity_factor=2", "--router-option capacity_factor=2 has its own flag; give --capacity-factor 2"),
    ("temperature=-1", "temperature=-1 must be positive"),
])  # fmt: skip
def test_invalid_router_options_are_refused(router_of_ones_own, given, sentence):
    with pytest.raises(ConfigurationError, match=re.escape(sentence)):
        check_options(MoEOptions(router=router_of_ones_own, router_option=given), LAYERS)


@pytest.mark.parametrize("router, given, kind", [
    ("dense_st", "renormalise=maybe", "true or false"), ("dense_st", "renormalise=2", "true or false"),
    ("dense_st", "renormalise=none", "true or false"), ("sparsemixer", "sampled=no", "true or false"),
    ("default_moe", "default_decay=slow", "a number"), ("default_moe", "default_decay=none", "a number"),
    ("remoe", "l1_multiplier=true", "a number"), ("expert_threshold", "threshold_decay=0,99.", None),
    ("expert_threshold", "warmup_updates=1.5", "a whole number"), ("expert_threshold", "warmup_updates=inf", "a whole number"),
    ("expert_threshold", "warmup_updates=true", "a whole number"),
])  # fmt: skip
def test_router_options_of_another_kind_are_refused(router, given, kind):
    sentence = f"--router-option {given} must be {kind}" if kind else f"--router-option {given} must be NAME=VALUE"
    with pytest.raises(ConfigurationError, match=re.escape(sentence)):
        check_options(MoEOptions(router=router, router_option=given), LAYERS)


@pytest.mark.parametrize("router, given, options", [
    ("dense_st", "renormalise=1", dict(renormalise=True)),
    ("sparsemixer", "sampled=0,scaled=False", dict(sampled=False, scaled=False)),
    ("expert_threshold", "warmup_updates=4e3,threshold_decay=0", dict(warmup_updates=4000, threshold_decay=0)),
])  # fmt: skip
def test_router_options_have_the_kind_that_the_router_names(router, given, options):
    found = named_options(router, given)
    assert found == options and all(type(found[name]) is type(value) for name, value in options.items())


def test_a_router_without_further_options_says_so():
    with pytest.raises(
        ConfigurationError, match="temperature=1 does not work with --router switch; it takes none besides its flags"
    ):
        check_options(MoEOptions(router="switch", router_option="temperature=1"), LAYERS)


def test_the_cores_errors_name_parameters_and_the_plugins_name_flags():
    with pytest.raises(ValueError, match="^num_experts=0 must be at least 1$"):
        build_gate("gshard", 4, 0)
    with pytest.raises(ConfigurationError) as error, in_flags():
        build_gate("sparsemixer_v2", 4, 2, top_k=3)
    assert error.value.message == "--moe-top-k 3 must lie between 1 and --num-experts 2"
