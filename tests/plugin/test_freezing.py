"""freezing.py: which parameters --freeze excludes from training, and what it refuses."""

import re
from argparse import Namespace
from types import SimpleNamespace

import pytest
import runs
import torch
from fairseq.modules.checkpoint_activations import checkpoint_wrapper
from omegaconf import OmegaConf
from torch import nn

from fairseq_sparsemixer.criterions.auxiliary_losses import AuxiliaryLosses
from fairseq_sparsemixer.errors import ConfigurationError
from fairseq_sparsemixer.moe.gates import update_step_states
from fairseq_sparsemixer.moe.layer import build_moe_layer
from fairseq_sparsemixer.plugin.checkpoints import read_checkpoint
from fairseq_sparsemixer.plugin.freezing import freeze, patterns, refuse_other_optimizer_state

GATES = r"\.gate\."
PROJECTIONS = {"layers.0.gate.projection.weight", "layers.1.gate.projection.weight"}


def configuration(given, backend="legacy_ddp"):
    return OmegaConf.create({"model": {"freeze": given}, "distributed_training": {"ddp_backend": backend}})


def a_model(**options):
    """Two layers with experts, embeddings shared by two modules."""
    model = nn.ModuleDict({"embed": nn.Embedding(5, 4), "output": nn.Linear(4, 5, bias=False)})
    model["output"].weight = model["embed"].weight
    model["layers"] = nn.ModuleList(build_moe_layer("switch", 4, 6, 3, jitter_eps=0.5, **options) for _ in range(2))
    return model


def frozen_names(model):
    return {name for name, parameter in model.named_parameters() if not parameter.requires_grad}


@pytest.mark.parametrize(
    "given, frozen",
    [
        (GATES, PROJECTIONS),
        (r"output", {"embed.weight"}),  # a name of the same parameter
        (r"embed,1\.experts\.bias_(in|out)", {"embed.weight", "layers.1.experts.bias_in", "layers.1.experts.bias_out"}),
        (r"layers\.[0-9]{1,2}\.gate,^embed", {*PROJECTIONS, "embed.weight"}),
        (r"^(?!.*experts)", {*PROJECTIONS, "embed.weight"}),
    ],
)
def test_parameters_whose_names_contain_a_pattern_are_frozen(given, frozen):
    model = a_model()
    freeze(configuration(given), model)
    assert frozen_names(model) == frozen


def test_nothing_is_frozen_without_the_flag():
    model = a_model()
    freeze(configuration(None), model)
    freeze(SimpleNamespace(model=SimpleNamespace()), model)  # a model of fairseq's own
    assert frozen_names(model) == set()


@pytest.mark.parametrize(
    "given, sentence",
    [
        (r"\.gates\.", r"--freeze \.gates\. matches no parameter; there are layers.0.gate.projection.weight, layers.1.gate"),
        (r"embed,expert_", r"--freeze expert_ matches no parameter; there are layers.0.experts.weight_in, "),
        ("zzz", r"--freeze zzz matches no parameter; there are embed.weight, "),
        (".", r"--freeze . matches every parameter, so nothing is left to train"),
        ("embed,layers", r"--freeze embed,layers matches every parameter"),
        ("(gate", r"--freeze (gate is not a regular expression (missing )"),
        ("", r"--freeze '' has an empty pattern"),
        ("gate,", r"--freeze 'gate,' has an empty pattern"),
    ],
)
def test_a_pattern_that_cannot_be_meant_is_refused_in_one_sentence(given, sentence):
    with pytest.raises(ConfigurationError, match=re.escape(sentence)):
        freeze(configuration(given), a_model())


def test_a_comma_within_braces_belongs_to_the_pattern():
    assert [pattern.pattern for pattern in patterns(r"a{1,2}b,c{,3},d")] == [r"a{1,2}b", "c{,3}", "d"]


def test_fully_sharded_data_parallelism_is_refused():
    with pytest.raises(ConfigurationError, match="--freeze embed needs single parameters"):
        freeze(configuration("embed", "fully_sharded"), a_model())


@pytest.mark.parametrize("sharded, backend", [(True, "legacy_ddp"), (False, "pytorch_ddp")])
def test_the_backend_changes_if_only_sharded_experts_are_trained(sharded, backend):
    model, cfg = a_model(), configuration("embed,gate", "pytorch_ddp")
    for name, parameter in model.named_parameters():
        if sharded and "experts" in name:
            parameter.expert = True
    freeze(cfg, model)
    assert cfg.distributed_training.ddp_backend == backend


def test_the_losses_of_a_frozen_gate_have_no_gradient_and_its_noise_stays():
    model = a_model(router_bias=True)
    criterion = AuxiliaryLosses()
    criterion.aux_weights, criterion.balance_weight = {"router_z": 1.0}, 1.0
    layers, tokens = list(model["layers"].train()), torch.randn(64, 4, requires_grad=True)
    freeze(configuration(r"layers\.0\.gate"), model)
    first, second = (torch.stack([layer(tokens) for _ in range(2)]) for layer in layers)
    assert not torch.equal(*first) and not torch.equal(*second)
    assert criterion.weighted_sum(layers[:1]) == 0
    torch.testing.assert_close(criterion.weighted_sum(layers), criterion.weighted_sum(layers[1:]), rtol=0, atol=0)
    (grad,) = torch.autograd.grad(criterion.weighted_sum(layers), tokens, retain_graph=True)
    (expected,) = torch.autograd.grad(sum(layers[1].routing.aux_losses.values()), tokens)
    assert torch.equal(grad, expected) and grad.any()


@pytest.mark.parametrize("given, moves", [(GATES, False), (r"gate\.projection", True), ("balancer$", False)])
def test_the_selection_bias_of_a_frozen_gate_stays(given, moves):
    model = a_model(bias_update_rate=0.1)
    freeze(configuration(given), model)
    for layer in model["layers"]:
        layer(torch.randn(8, 4, requires_grad=True)).sum().backward()
    update_step_states(model)
    assert all(bool(layer.gate.balancer.bias.any()) == moves for layer in model["layers"])


def test_checkpointed_layers_behind_frozen_ones_are_trained():
    def gradients(wrap):
        torch.manual_seed(1)
        layers = [wrap(nn.Linear(4, 4)) for _ in range(3)]
        model = nn.Sequential(nn.Embedding(5, 4), *layers)
        freeze(configuration("^0,^1"), model)
        model(torch.arange(5)).square().sum().backward()
        return [parameter.grad for parameter in model.parameters()]

    plain, recomputed = gradients(lambda layer: layer), gradients(checkpoint_wrapper)
    assert [grad is None for grad in recomputed] == [True] * 3 + [False] * 4
    torch.testing.assert_close(recomputed, plain, rtol=0, atol=0)


@pytest.mark.parametrize(
    "theirs, own, refused",
    [
        (None, "embed", True),
        ("embed", None, True),
        ("embed", "gate", True),
        ("embed", "output", False),  # the same parameter
        ("gate", "gate", False),
        (None, None, False),
    ],
)
def test_the_optimizer_state_of_other_parameters_is_refused(theirs, own, refused):
    for settings in ({"freeze": theirs}, Namespace(freeze=theirs)):
        state = {"model": {}, "cfg": {"model": settings}, "last_optimizer_state": {"state": {}}}
        if refused:
            with pytest.raises(ConfigurationError, match=r"last.pt was trained with.* --finetune-from-model, or by --reset-opt"):
                refuse_other_optimizer_state(state, "last.pt", a_model(), own)
        else:
            refuse_other_optimizer_state(state, "last.pt", a_model(), own)
        refuse_other_optimizer_state({**state, "last_optimizer_state": None}, "last.pt", a_model(), own)


@pytest.mark.slow
def test_a_resumed_run_equals_an_uninterrupted_one_and_leaves_frozen_parameters_as_they_are(corpus, tmp_path):
    flags = ["--freeze", r"\.gate\.,^encoder.*\.experts\.,embed_tokens", "--checkpoint-activations"]
    start = runs.train(corpus, tmp_path / "start", updates=1)
    assert len(start) == 1
    last, weights = tmp_path / "run" / "checkpoint_last.pt", ["--finetune-from-model", tmp_path / "start" / "checkpoint_last.pt"]
    whole = runs.train(corpus, tmp_path / "whole", *flags, *weights, updates=4)
    losses = runs.train(corpus, tmp_path / "run", *flags, *weights, updates=2)
    losses += runs.train(corpus, tmp_path / "run", *flags, updates=4)
    assert losses == whole
    before, after = (read_checkpoint(str(path)) for path in (weights[1], last))
    same = {name for name, value in before["model"].items() if torch.equal(value, after["model"][name])}
    frozen = {
        name
        for name in before["model"]
        if ".gate." in name or name.startswith("encoder") and ".experts." in name or "embed_tokens" in name
    }
    parameters = {name for name in before["model"] if "_float_tensor" not in name and not name.endswith("version")}
    assert same & parameters == frozen & parameters and len(frozen) > 8
    for other, expected in (([], "with --freeze"), (["--freeze", "embed_tokens"], "this run is with --freeze embed_tokens")):
        with pytest.raises(SystemExit, match=expected):
            runs.train(corpus, tmp_path / "other", *other, "--restore-file", last, updates=5)
