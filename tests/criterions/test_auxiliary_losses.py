"""Auxiliary losses in a criterion: their contribution to the loss, their logging, and how both scale."""

import json
import math
import re
from dataclasses import fields

import pytest
import torch
from fairseq.criterions import CRITERION_DATACLASS_REGISTRY, CRITERION_REGISTRY
from fairseq.criterions.adaptive_loss import AdaptiveLoss, AdaptiveLossConfig
from fairseq.criterions.composite_loss import CompositeLoss
from fairseq.criterions.cross_entropy import CrossEntropyCriterion
from fairseq.criterions.masked_lm import MaskedLmConfig, MaskedLmLoss
from fairseq.criterions.sentence_prediction import SentencePredictionConfig, SentencePredictionCriterion
from fairseq.logging import metrics
from fairseq_sparsemixer.criterions import MoECrossEntropyCriterion
from fairseq_sparsemixer.criterions.auxiliary_losses import AuxiliaryLossConfig, warn_of_plain_criterion
from fairseq_sparsemixer.criterions.metrics import log_routing_metrics, sum_routing_logs
from fairseq_sparsemixer.criterions.moe_cross_entropy import MoECrossEntropyCriterionConfig
from torch import nn

from fairseq_sparsemixer.errors import ConfigurationError
from fairseq_sparsemixer.moe.layer import named_moe_layers


def build(task, **flags):
    cfg = MoECrossEntropyCriterionConfig(sentence_avg=False, **flags)
    return MoECrossEntropyCriterion.build_criterion(cfg, task)


@pytest.fixture
def model(build_translation_model):
    """Switch without noise, so the same batch always gets the same routing."""
    return build_translation_model(router="switch", jitter_eps=0.0)


def test_the_loss_is_fairseqs_plus_weighted_auxiliary_losses_times_sample_size(model, translation_task, translation_batch):
    sample = translation_batch(3, 6)
    criterion = build(translation_task, moe_balance_loss_weight=0.3, moe_z_loss_weight=0.2)
    loss, sample_size, log = criterion(model, sample)
    plain, plain_size, plain_log = CrossEntropyCriterion(translation_task, False)(model, sample)
    layers = [layer for _, layer in named_moe_layers(model)]
    expected = sum(0.3 * layer.routing.aux_losses["balance"] + 0.2 * layer.routing.aux_losses["router_z"] for layer in layers)
    assert sample_size == plain_size
    torch.testing.assert_close(loss, plain + sample_size * expected)
    assert {name: log[name] for name in plain_log} == plain_log  # logged losses are comparable with a dense model's


@pytest.mark.parametrize("training", [True, False])
def test_validation_reports_fairseqs_loss_only(model, translation_task, translation_batch, training):
    model.train(training)
    sample = translation_batch(3, 6)
    _, _, log = build(translation_task)(model, sample)
    _, _, plain = CrossEntropyCriterion(translation_task, False)(model, sample)
    assert log["loss"] == plain["loss"]


def test_a_dense_model_gets_fairseqs_criterion_unchanged(build_translation_model, translation_task, translation_batch):
    dense, sample = build_translation_model(router="dense"), translation_batch(3, 6)
    loss, size, log = build(translation_task)(dense, sample)
    plain = CrossEntropyCriterion(translation_task, False)(dense, sample)
    assert (loss, size, log) == plain


def gradient(model, criterion, batches):
    """The gradient of batches accumulated into one update, as in fairseq's trainer."""
    model.zero_grad()
    total = 0
    for sample in batches:
        loss, sample_size, _ = criterion(model, sample)
        loss.backward()
        total += sample_size
    return {name: parameter.grad / total for name, parameter in model.named_parameters() if parameter.grad is not None}


def test_accumulating_two_equal_halves_gives_the_whole_batchs_gradient(model, translation_task, translation_batch):
    """The halves are identical, so the balance loss of each half, and its gradient, equals that of the whole batch."""
    criterion = build(translation_task, moe_balance_loss_weight=1.0, moe_z_loss_weight=0.1)
    sample = translation_batch(4, 4)
    once, twice = gradient(model, criterion, [sample]), gradient(model, criterion, [sample, sample])
    for name in once:
        torch.testing.assert_close(once[name], twice[name], rtol=1e-4, atol=1e-6)


def test_accumulated_auxiliary_losses_are_weighted_by_sample_size(model, translation_task, translation_batch):
    """fairseq's loss cancels; the mean of the halves' balance losses remains, weighted by tokens."""
    halves = [translation_batch(2), translation_batch(8, 8)]
    with_aux = gradient(model, build(translation_task, moe_balance_loss_weight=1.0), halves)
    without = gradient(model, build(translation_task, moe_balance_loss_weight=0.0), halves)
    model.zero_grad()
    tokens = [half["ntokens"] for half in halves]
    for half, count in zip(halves, tokens):
        model(**half["net_input"])
        balance = sum(layer.routing.aux_losses["balance"] for _, layer in named_moe_layers(model))
        (balance * count / sum(tokens)).backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(with_aux[name] - without[name], parameter.grad, rtol=1e-3, atol=1e-5)


def test_the_budget_loss_of_conditional_routing_is_weighted_by_sample_size(
    build_translation_model, translation_task, translation_batch
):
    """In float64: |mean of g over the tokens of all layers - budget|, for each of two accumulated batches."""
    model = build_translation_model(router="switch", jitter_eps=0.0, moe_cmr=True).double()
    halves = [translation_batch(2), translation_batch(8, 5)]
    with_budget = gradient(model, build(translation_task, moe_cmr_budget=0.9, moe_cmr_loss_weight=3.0), halves)
    without = gradient(model, build(translation_task, moe_cmr_loss_weight=0.0), halves)
    model.zero_grad()
    sizes = [half["ntokens"] for half in halves]
    for half, size in zip(halves, sizes):
        model(**half["net_input"])
        gates, tokens = [], 0
        for _, layer in named_moe_layers(model):
            real = ~layer.routing.padding_mask if layer.routing.padding_mask is not None else slice(None)
            gates.append(layer.routing.cmr_gate[real])
            tokens += len(gates[-1])
        assert tokens == 2 * size  # a layer in each stack; sources and targets have the same lengths
        (3 * (torch.cat(gates).mean() - 0.9).abs() * size / sum(sizes)).backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(with_budget[name] - without[name], parameter.grad, msg=name)


def test_the_gate_of_conditional_routing_and_its_budget_loss_are_logged(
    build_translation_model, translation_task, translation_batch
):
    model, criterion = build_translation_model(moe_cmr=True).eval(), build(translation_task, moe_cmr_budget=0.2)
    logs, gates, losses, sizes = [], [], [], []
    for sample in (translation_batch(3, 6), translation_batch(9)):
        _, size, log = criterion(model, sample)
        logs.append(log)
        own = torch.cat([layer.routing.cmr_gate[layer.routing.cmr_gate != 0] for _, layer in named_moe_layers(model)])
        gates.append(own.detach())
        losses.append((own.mean() - 0.2).abs().item())
        sizes.append(size)
    with metrics.aggregate() as logged:
        type(criterion).reduce_metrics(logs)
    assert logged["moe_cmr_gate"].avg == pytest.approx(torch.cat(gates).mean().item(), abs=1e-3)
    assert logged["moe_cmr_loss"].avg == pytest.approx(sum(a * b for a, b in zip(losses, sizes)) / sum(sizes), abs=1e-3)


def test_layers_have_a_mean_gate_each_but_no_budget_loss_of_their_own(
    build_translation_model, translation_task, translation_batch
):
    model, criterion = build_translation_model(moe_cmr=True), build(translation_task)
    _, size, log = criterion(model, translation_batch(3, 6))
    with metrics.aggregate() as logged:
        log_routing_metrics(sum_routing_logs([log]), size, [name for name, _ in named_moe_layers(model)])
    cmr = {name for name in logged if "moe_cmr" in name}
    assert cmr == {"moe_cmr_loss", "moe_cmr_gate", "encoder.layers.0/moe_cmr_gate", "decoder.layers.0/moe_cmr_gate"}


def test_without_conditional_routing_there_is_no_budget_loss(model, translation_task, translation_batch):
    _, _, log = build(translation_task, moe_cmr_loss_weight=5.0)(model, translation_batch(3))
    assert not any("cmr" in name for name in log)


def test_activation_checkpointing_gives_the_same_gradients(build_translation_model, translation_task, translation_batch):
    plain = build_translation_model(dropout=0.1)
    checkpointed = build_translation_model(dropout=0.1, checkpoint_activations=True)
    checkpointed.load_state_dict(plain.state_dict())
    sample, found = translation_batch(3, 6), []
    for candidate in (plain, checkpointed):
        torch.manual_seed(3)
        criterion = build(translation_task, moe_balance_loss_weight=1.0, moe_z_loss_weight=1.0)
        found.append(gradient(candidate, criterion, [sample]))
    for name in found[0]:
        torch.testing.assert_close(found[0][name], found[1][name], rtol=1e-6, atol=1e-6)


def test_a_layer_skipped_by_layerdrop_adds_no_auxiliary_loss(build_translation_model, translation_task, translation_batch):
    model = build_translation_model(encoder_layerdrop=0.999)
    criterion, sample = build(translation_task, moe_balance_loss_weight=1.0), translation_batch(3, 6)
    criterion(model.eval(), sample)  # all layers run
    _, _, log = criterion(model.train(), sample)
    (_, skipped), (_, ran) = named_moe_layers(model)
    assert skipped.routing is None and ran.routing is not None
    assert log["moe/tokens"].tolist() == [0, sample["ntokens"]] and log["moe/aux/balance"][0] == 0


@pytest.mark.parametrize("moe_cmr", [False, True])
def test_the_log_has_the_same_entries_if_layerdrop_skips_every_layer(
    moe_cmr, build_translation_model, translation_task, translation_batch
):
    """Ranks sum their logs entry by entry, and would deadlock if an entry were missing."""
    model = build_translation_model(encoder_layerdrop=0.999, decoder_layerdrop=0.999, moe_cmr=moe_cmr)
    criterion, sample = build(translation_task), translation_batch(3, 6)
    _, _, full = criterion(model.eval(), sample)
    loss, _, empty = criterion(model.train(), sample)
    assert {name: value.shape for name, value in empty.items() if name.startswith("moe/")} == {
        name: value.shape for name, value in full.items() if name.startswith("moe/")
    }
    assert not any(value.any() for name, value in empty.items() if name.startswith("moe/"))
    assert loss.isfinite()


def test_an_auxiliary_loss_with_weight_zero_may_overflow(model, translation_task, translation_batch):
    criterion, sample = build(translation_task, moe_z_loss_weight=0.0, moe_balance_loss_weight=1.0), translation_batch(3, 6)
    for layer in model.modules():
        if hasattr(layer, "projection"):
            layer.projection.weight.data *= 1e21
    loss, _, log = criterion(model, sample)
    assert log["moe/aux/router_z"].isinf().any() and loss.isfinite()
    loss.backward()
    assert all(parameter.grad.isfinite().all() for name, parameter in model.named_parameters() if "experts" in name)
    criterion = build(translation_task, moe_z_loss_weight=0.1, moe_balance_loss_weight=1.0)
    assert criterion(model, sample)[0].isinf()  # with a weight, the overflow is visible


def test_moe_layers_are_named_after_their_transformer_layers(model):
    assert [name for name, _ in named_moe_layers(model)] == ["encoder.layers.0", "decoder.layers.0"]
    assert [name for name, _ in named_moe_layers(nn.Sequential(model))] == ["0.encoder.layers.0", "0.decoder.layers.0"]


@pytest.mark.parametrize("flags, message", [
    (dict(moe_balance_loss_weight=-1.0), "--moe-balance-loss-weight -1.0 must be at least 0 and finite"),
    (dict(moe_z_loss_weight=-0.5), "--moe-z-loss-weight -0.5 must be at least 0 and finite"),
    (dict(moe_balance_loss_weight=math.nan), "--moe-balance-loss-weight nan must be at least 0 and finite"),
    (dict(moe_z_loss_weight=math.inf), "--moe-z-loss-weight inf must be at least 0 and finite"),
    (dict(moe_load_interval=0), "--moe-load-interval 0 must be at least 1"),
])  # fmt: skip
def test_invalid_weights_are_named(translation_task, flags, message):
    with pytest.raises(ConfigurationError, match=message):
        build(translation_task, **flags)


def test_the_criterions_class_name_is_kept_because_fairseq_compares_it_on_resume(translation_task):
    assert type(build(translation_task)).__name__ == "MoECrossEntropyCriterion"


@pytest.mark.parametrize("name, cls, remedy", [
    ("cross_entropy", CrossEntropyCriterion, "use --criterion moe_cross_entropy$"),
    ("adaptive_loss", AdaptiveLoss, "use --criterion moe_adaptive_loss$"),
    ("composite_loss", CompositeLoss, "use --criterion electra or .*moe_cross_entropy or "),
])  # fmt: skip
def test_a_criterion_without_auxiliary_losses_warns_and_names_the_right_one(caplog, name, cls, remedy):
    warn_of_plain_criterion(cls.__new__(cls), name)
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert re.search(f"--criterion {name} leaves out the routers' load-balancing losses.*{remedy}", record.message)


def test_a_criterion_with_auxiliary_losses_gives_no_warning(translation_task, caplog):
    warn_of_plain_criterion(build(translation_task), "moe_cross_entropy")
    assert not caplog.records


def test_the_load_file_counts_the_tokens_of_each_expert_over_all_choices(
    build_translation_model, translation_task, translation_batch, tmp_path
):
    model = build_translation_model(router="noisy_topk")  # two choices per token
    criterion = build(translation_task, moe_load_file=str(tmp_path / "load.jsonl"), moe_load_interval=1)
    _, _, log = criterion(model, translation_batch(3, 6))
    with metrics.aggregate(new_root=True):
        type(criterion).reduce_metrics([log])
    (line,) = (tmp_path / "load.jsonl").read_text().splitlines()
    expected = []
    for _, layer in named_moe_layers(model):
        routing = layer.routing
        real = torch.ones(len(routing.expert_index)).bool() if routing.padding_mask is None else ~routing.padding_mask
        expected.append(torch.bincount(routing.expert_index[real].flatten(), minlength=4).tolist())
        assert sum(expected[-1]) == 2 * real.sum()
    assert json.loads(line) == {"num_updates": 1, "layers": ["encoder.layers.0", "decoder.layers.0"], "load": expected}


@pytest.mark.parametrize("name, parent, config", [
    ("moe_adaptive_loss", AdaptiveLoss, AdaptiveLossConfig),
    ("moe_masked_lm", MaskedLmLoss, MaskedLmConfig),
    ("moe_sentence_prediction", SentencePredictionCriterion, SentencePredictionConfig),
])  # fmt: skip
def test_a_criterion_is_registered_with_fairseqs_flags_and_ours(name, parent, config):
    assert issubclass(CRITERION_REGISTRY[name], parent)
    flags = {field.name for field in fields(CRITERION_DATACLASS_REGISTRY[name])}
    assert flags == {field.name for source in (config, AuxiliaryLossConfig) for field in fields(source)}
