"""Fidelity of a layer in a trained model, with the model's own loss downstream."""

from dataclasses import replace

import pytest
import torch
from fairseq.criterions.label_smoothed_cross_entropy import LabelSmoothedCrossEntropyCriterion

from fairseq_sparsemixer.errors import ConfigurationError
from fairseq_sparsemixer.tools import sentences
from fairseq_sparsemixer.tools.fidelity import exact_gradient, trained
from fairseq_sparsemixer.tools.fidelity.problem import Problem

LAYER = "encoder.layers.0"


@pytest.fixture
def setting(build_translation_model, translation_task):
    """(model, criterion, layer, contexts) of two sentences."""
    model = build_translation_model(router="sparsemixer").double().eval().requires_grad_(False)
    criterion = LabelSmoothedCrossEntropyCriterion(translation_task, sentence_avg=False, label_smoothing=0.1)
    _, moe = trained.find_layer(model, LAYER, "model.pt")
    samples = [sentences.make_sample(translation_task, *pair) for pair in (("w1 w2 w3", "w4 w5"), ("w6", "w7 w8 w9"))]
    return model, criterion, moe, [trained.record_context(model, moe, criterion, sample) for sample in samples]


def plain_losses(model, criterion, contexts):
    with trained.double_softmax():
        return [criterion(model, context.sample, reduce=True)[0] for context in contexts]


def test_with_the_models_own_output_every_tokens_loss_is_its_sentences_loss(setting):
    model, criterion, moe, contexts = setting
    loss = trained.DownstreamLoss(model, criterion, moe, contexts, tokens=6)
    losses = loss(torch.cat([context.outcome for context in contexts]).unsqueeze(0))[0]
    first, second = plain_losses(model, criterion, contexts)
    torch.testing.assert_close(losses, torch.stack([first] * 4 + [second] * 2), rtol=1e-12, atol=0)


def test_replacing_one_tokens_expert_gives_the_loss_of_routing_it_there(setting):
    model, criterion, moe, contexts = setting
    context, position = contexts[0], 2
    with torch.no_grad():
        routing = moe.gate(context.inputs)
    index, weight = routing.expert_index.clone(), routing.combine_weight.clone()
    index[position], weight[position] = (index[position] + 1) % 4, 0.37
    sent = replace(routing, expert_index=index, combine_weight=weight)
    frozen = [trained.swapped(gate, "forward", lambda *args, r=r: r) for gate, r in context.routings]
    with trained.swapped(moe.gate, "forward", lambda *args: sent), frozen[0]:
        (expected,) = plain_losses(model, criterion, [context])
    y = context.outcome.clone()
    y[position] = 0.37 * context.outputs[position, index[position, 0]]
    found = trained.DownstreamLoss(model, criterion, moe, [context], tokens=4)(y)
    torch.testing.assert_close(found[position], expected, rtol=1e-12, atol=0)


def test_the_losses_gradient_matches_its_derivative(setting):
    model, criterion, moe, contexts = setting
    loss = trained.DownstreamLoss(model, criterion, moe, contexts, tokens=5)
    y = torch.cat([context.outcome for context in contexts])[:5].requires_grad_()
    direction = torch.randn(5, 16).double()
    (gradient,) = torch.autograd.grad(loss(y).sum(), y)
    step = 1e-5 * direction
    difference = (loss(y.detach() + step) - loss(y.detach() - step)) / 2e-5
    torch.testing.assert_close((gradient * direction).sum(1), difference, rtol=1e-5, atol=1e-7)


def test_the_evaluation_batch_size_does_not_change_results(setting, monkeypatch):
    model, criterion, moe, contexts = setting
    loss = trained.DownstreamLoss(model, criterion, moe, contexts, tokens=6)
    y = torch.randn(3, 6, 16).double()
    whole = loss.with_gradient(y)
    monkeypatch.setattr(trained, "POSITIONS", 8)
    for found, expected in zip(loss.with_gradient(y), whole):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


def test_the_enumeration_through_the_model_agrees_with_its_derivative(setting):
    model, criterion, moe, contexts = setting
    inputs = torch.cat([context.inputs for context in contexts])
    problem = Problem(
        inputs,
        moe.gate.logits(inputs),
        torch.cat([context.outputs for context in contexts]),
        trained.DownstreamLoss(model, criterion, moe, contexts, 6),
    )
    exact = exact_gradient(problem)
    torch.testing.assert_close(exact.full, exact.autograd, rtol=1e-9, atol=1e-11)


def test_the_model_is_unchanged_afterwards(setting):
    model, criterion, moe, contexts = setting
    trained.DownstreamLoss(model, criterion, moe, contexts, 6)(torch.randn(1, 6, 16).double())
    assert "forward" not in vars(moe) and not any("forward" in vars(gate) for gate, _ in contexts[0].routings)


def test_an_unknown_layer_lists_the_existing_ones(build_translation_model):
    with pytest.raises(
        ConfigurationError, match="--layer encoder.layers.1 is not an MoE layer of m.pt; choose from encoder.layers.0"
    ):
        trained.find_layer(build_translation_model(), "encoder.layers.1", "m.pt")


def test_a_model_without_experts_is_refused(build_translation_model):
    with pytest.raises(ConfigurationError, match="m.pt has no MoE layer; give one trained with a --router other than dense"):
        trained.find_layer(build_translation_model(router="dense"), None, "m.pt")


@pytest.mark.parametrize("flags", [dict(moe_eom=0.1), dict(moe_fom=0.1), dict(moe_cmr=True)])
def test_a_model_whose_outputs_are_masked_or_mixed_is_refused(flags, build_translation_model):
    with pytest.raises(ConfigurationError, match="m.pt was trained with --moe-eom, --moe-fom or --moe-cmr, which change"):
        trained.find_layer(build_translation_model(**flags), None, "m.pt")


@pytest.mark.parametrize("router", ["default_moe", "expert_choice", "expert_threshold", "remoe"])
def test_a_router_whose_output_is_not_that_of_one_expert_is_refused(router, build_translation_model):
    model = build_translation_model(router=router, moe_encoder_only=True)
    with pytest.raises(ConfigurationError, match=f"--router {router} of m.pt does not make a token's output from one expert"):
        trained.find_layer(model, None, "m.pt")


def test_a_layer_with_several_experts_per_token_is_refused(build_translation_model):
    with pytest.raises(ConfigurationError, match="gives each token 2 experts, but fidelity needs k = 1"):
        trained.find_layer(build_translation_model(router="sparsemixer_v2", moe_top_k=2), None, "m.pt")


def test_texts_must_be_parallel(tmp_path):
    (tmp_path / "a").write_text("one\ntwo\n")
    (tmp_path / "b").write_text("eins\n")
    with pytest.raises(ConfigurationError, match="has 2 lines, but --target .*b has 1; give files of paired lines"):
        sentences.read_pairs(str(tmp_path / "a"), str(tmp_path / "b"))
    with pytest.raises(ConfigurationError, match="--target .*missing cannot be read"):
        sentences.read_pairs(str(tmp_path / "a"), str(tmp_path / "missing"))
