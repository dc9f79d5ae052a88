"""The adaptive-softmax loss with the routers' auxiliary losses."""

from argparse import Namespace

import pytest
import torch
from fairseq_sparsemixer.criterions.moe_adaptive_loss import MoEAdaptiveLoss, MoEAdaptiveLossConfig

from fairseq_sparsemixer.errors import ConfigurationError
from fairseq_sparsemixer.moe.layer import named_moe_layers
from fairseq_sparsemixer.plugin.models import transformer_lm_moe
from fairseq_sparsemixer.plugin.models.transformer_lm_moe import TransformerLanguageModelMoE, TransformerLanguageModelMoEConfig


def build(task, architecture, **flags):
    small = dict(decoder_layers=3, decoder_embed_dim=16, decoder_ffn_embed_dim=32, decoder_attention_heads=2, num_experts=4)
    args = Namespace(**small, **flags)
    architecture(args)
    cfg = TransformerLanguageModelMoEConfig.from_namespace(args)
    cfg.criterion, cfg.tokens_per_sample, cfg.max_target_positions = None, 32, 32
    return TransformerLanguageModelMoE.build_model(cfg, task)


def criterion_of(task, **flags):
    cfg = MoEAdaptiveLossConfig(sentence_avg=False, ddp_backend="legacy_ddp")
    for name, value in flags.items():
        setattr(cfg, name, value)
    return MoEAdaptiveLoss.build_criterion(cfg, task)


def test_the_loss_is_the_negative_log_likelihood_plus_the_auxiliary_loss(language_modeling_task, language_modeling_batch):
    cutoffs = dict(adaptive_input_cutoff="8,16", adaptive_softmax_cutoff="8,16", adaptive_softmax_dropout=0.0)
    model = build(language_modeling_task, transformer_lm_moe.wiki103, **cutoffs).eval()
    sample = language_modeling_batch(9, 4)
    for second_of_cluster in (9, 17):  # fairseq's adaptive_loss treats the second word of a rare cluster as padding
        sample["target"][sample["target"] == second_of_cluster] += 1
    loss, sample_size, log = criterion_of(language_modeling_task, moe_balance_loss_weight=0.5)(model, sample)
    log_probabilities = model.get_normalized_probs(model(**sample["net_input"]), log_probs=True)
    real = sample["target"] != language_modeling_task.dictionary.pad()
    nll = -log_probabilities[real].gather(1, sample["target"][real].unsqueeze(1)).sum()
    balance = sum(layer.routing.aux_losses["balance"] for _, layer in named_moe_layers(model))
    assert sample_size == 13
    torch.testing.assert_close(log["loss"].squeeze(), nll.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(loss.squeeze(), nll + 13 * 0.5 * balance, rtol=1e-5, atol=1e-5)
    embeddings, softmax = model.decoder.embed_tokens.embeddings, model.decoder.adaptive_softmax
    assert softmax.head.word_proj.weight is embeddings[0][0].weight  # tied
    loss.backward()
    assert all(layer.experts.weight_in.grad.abs().sum() > 0 for _, layer in named_moe_layers(model))


def test_missing_requirements_of_the_adaptive_loss_are_named(language_modeling_task, language_modeling_batch):
    with pytest.raises(ConfigurationError, match="--criterion moe_cross_entropy"):
        criterion_of(language_modeling_task)(build(language_modeling_task, transformer_lm_moe.tiny), language_modeling_batch(3))
    with pytest.raises(ConfigurationError, match="--ddp-backend legacy_ddp"):
        criterion_of(language_modeling_task, ddp_backend="pytorch_ddp")
