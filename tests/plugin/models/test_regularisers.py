"""NLLB's regularisers by their flags: in every model, under activation checkpointing, in checkpoints; and what is refused."""

import copy
import re
from argparse import Namespace

import pytest
import torch
from fairseq_sparsemixer.criterions import MoECrossEntropyCriterion
from fairseq_sparsemixer.criterions.moe_cross_entropy import MoECrossEntropyCriterionConfig
from torch import nn

from fairseq_sparsemixer.errors import ConfigurationError
from fairseq_sparsemixer.moe.layer import moe_layers
from fairseq_sparsemixer.plugin.models.roberta_moe import RobertaMoEModel
from fairseq_sparsemixer.plugin.models.roberta_moe import tiny as roberta_tiny
from fairseq_sparsemixer.plugin.models.transformer_lm_moe import TransformerLanguageModelMoE, TransformerLanguageModelMoEConfig

FLAGS = dict(moe_eom=0.2, moe_fom=0.1, moe_cmr=True, moe_cmr_gate_dropout=0.3)


def criterion_of(task, **flags):
    return MoECrossEntropyCriterion.build_criterion(MoECrossEntropyCriterionConfig(sentence_avg=False, **flags), task)


def language_model(task, **flags):
    small = dict(
        decoder_layers=2, decoder_embed_dim=16, decoder_ffn_embed_dim=24, decoder_attention_heads=2, max_target_positions=32
    )
    given = Namespace(**{**small, "decoder_input_dim": 16, "decoder_output_dim": 16, "num_experts": 4, **flags})
    return TransformerLanguageModelMoE.build_model(TransformerLanguageModelMoEConfig.from_namespace(given), task)


def roberta(task, **flags):
    args = Namespace(num_experts=4, **flags)
    roberta_tiny(args)
    return RobertaMoEModel.build_model(args, task)


@pytest.mark.parametrize("kind", ["translation", "language model", "roberta"])
def test_the_flags_reach_every_layer_of_every_model(kind, build_translation_model, language_modeling_task, masked_lm_task):
    build = {
        "translation": build_translation_model,
        "language model": lambda **flags: language_model(language_modeling_task, **flags),
        "roberta": lambda **flags: roberta(masked_lm_task, **flags),
    }[kind]
    layers = moe_layers(build(activation_fn="gelu", activation_dropout=0.4, **FLAGS))
    assert layers and all((layer.eom, layer.fom, layer.cmr.gate_dropout) == (0.2, 0.1, 0.3) for layer in layers)
    assert all(layer.cmr.shared.dropout == 0.4 for layer in layers)
    assert all((layer.eom, layer.fom, layer.cmr) == (0, 0, None) for layer in moe_layers(build()))  # off by default


def test_the_shared_network_is_a_dense_layer_whatever_the_experts_are(build_translation_model):
    model = build_translation_model(
        moe_cmr=True, expert_activation="swiglu", expert_ffn_embed_dim=20, expert_dropout=0.3, activation_dropout=0.1
    )
    for layer in moe_layers(model):
        assert layer.experts.weight_in.shape == (4, 16, 40) and layer.experts.dropout == 0.3
        assert layer.cmr.shared.weight_in.shape == (1, 16, 32) and layer.cmr.shared.dropout == 0.1
        assert not layer.cmr.shared.gated


@pytest.mark.parametrize("router", ["sparsemixer", "gshard", "remoe"])
def test_activation_checkpointing_draws_the_same_masks_again(
    router, build_translation_model, translation_task, translation_batch
):
    flags = dict(router=router, dropout=0.1, **FLAGS)
    plain, checkpointed = build_translation_model(**flags), build_translation_model(checkpoint_activations=True, **flags)
    checkpointed.load_state_dict(plain.state_dict())
    sample, found = translation_batch(3, 6, 5), []
    for model in (plain, checkpointed):
        torch.manual_seed(3)
        loss, _, _ = criterion_of(translation_task)(model, sample)
        torch.rand(7)  # another user of the random state between forward and backward
        loss.backward()
        found.append((loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}))
    torch.testing.assert_close(found[0][0], found[1][0])
    assert found[0][1].keys() == found[1][1].keys() and any(".cmr.gate." in name for name in found[0][1])
    for name, gradient in found[0][1].items():
        torch.testing.assert_close(gradient, found[1][1][name], rtol=1e-6, atol=1e-6, msg=name)


def test_padding_changes_neither_loss_nor_gradients(build_translation_model, translation_task, translation_batch):
    """Without random masks. The longer batch has the same sentences, with two more columns of padding."""
    model = build_translation_model(router="switch", jitter_eps=0.0, moe_cmr=True)
    criterion, sample = criterion_of(translation_task), translation_batch(3, 6)
    wider = copy.deepcopy(sample)
    pad = translation_task.target_dictionary.pad()
    wider["net_input"]["src_tokens"] = nn.functional.pad(sample["net_input"]["src_tokens"], (2, 0), value=pad)
    for part in ("prev_output_tokens", "target"):
        holder = [state if part == "target" else state["net_input"] for state in (sample, wider)]
        holder[1][part] = nn.functional.pad(holder[0][part], (0, 2), value=pad)
    results = []
    for batch in (sample, wider):
        model.zero_grad()
        loss, _, log = criterion(model, batch)
        loss.backward()
        results.append((loss.detach(), log["moe/cmr_gate"], {n: p.grad for n, p in model.named_parameters()}))
    torch.testing.assert_close(results[0][:2], results[1][:2])
    for name, gradient in results[0][2].items():
        torch.testing.assert_close(gradient, results[1][2][name], rtol=1e-4, atol=1e-6, msg=name)


def test_a_copy_of_the_model_carries_no_graph_and_no_coin(build_translation_model, translation_batch):
    model = build_translation_model(**FLAGS)
    for layer in moe_layers(model):
        layer.stay_on_rank = True
    model(**translation_batch(3, 4)["net_input"])
    assert all(layer.routing is None and not layer.stay_on_rank for layer in moe_layers(copy.deepcopy(model)))


def test_generation_with_retained_dropout_keeps_that_of_the_shared_network(build_translation_model):
    model = build_translation_model(moe_cmr=True, activation_dropout=0.3)
    model.make_generation_fast_(retain_dropout=True)
    assert all(layer.cmr.shared.drop_at_inference for layer in moe_layers(model))
    model = build_translation_model(moe_cmr=True, activation_dropout=0.3)
    model.make_generation_fast_()
    assert not any(layer.cmr.shared.drop_at_inference for layer in moe_layers(model))


REFUSALS = [
    (dict(moe_eom=1.0), "--moe-eom 1.0 must be at least 0 and less than 1"),
    (dict(moe_fom=-0.5), "--moe-fom -0.5 must be at least 0 and less than 1"),
    (dict(moe_gating_dropout=2), "--moe-gating-dropout 2 must be at least 0 and less than 1"),
    (dict(moe_cmr=True, moe_cmr_gate_dropout=1.0), "--moe-cmr-gate-dropout 1.0 must be at least 0"),
    (dict(moe_cmr_gate_dropout=0.1), "--moe-cmr-gate-dropout 0.1 needs --moe-cmr; add --moe-cmr, or leave it out"),
    (dict(router="default_moe", moe_eom=0.1), "--moe-eom 0.1 does not work with --router default_moe, in which"),
    (dict(router="default_moe", moe_gating_dropout=0.1), "--moe-gating-dropout 0.1 does not work with --router default_moe"),
]


@pytest.mark.parametrize("flags, sentence", REFUSALS, ids=[sentence.split(";")[0] for _, sentence in REFUSALS])
def test_what_makes_no_sense_is_refused_in_one_sentence(flags, sentence, build_translation_model):
    with pytest.raises(ConfigurationError, match=re.escape(sentence)) as caught:
        build_translation_model(**flags)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name, value", [("moe_cmr_budget", 1.5), ("moe_cmr_budget", -0.1), ("moe_cmr_loss_weight", -1.0)])
def test_numbers_of_the_budget_out_of_range_are_refused(name, value, translation_task):
    with pytest.raises(ConfigurationError, match=f"--{name.replace('_', '-')} {value} must be at least 0"):
        criterion_of(translation_task, **{name: value})


def test_a_checkpoint_with_cmr_needs_the_flag_and_one_without_has_no_use_for_it(build_translation_model):
    with_cmr, without = build_translation_model(moe_cmr=True), build_translation_model()
    with pytest.raises(ConfigurationError, match="the checkpoint has --moe-cmr's shared networks, .* give --moe-cmr"):
        without.load_state_dict(with_cmr.state_dict())
    with pytest.raises(ConfigurationError, match="the flags have --moe-cmr's .* leave out --moe-cmr"):
        with_cmr.load_state_dict(without.state_dict())
    other = build_translation_model(moe_cmr=True, encoder_ffn_embed_dim=40, expert_ffn_embed_dim=32)
    with pytest.raises(ConfigurationError, match="in the checkpoint, but .* by the flags; give the feed-forward sizes"):
        other.load_state_dict(with_cmr.state_dict())
