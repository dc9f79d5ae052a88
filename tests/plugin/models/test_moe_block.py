"""fairseq's transformer layers with experts."""

from argparse import Namespace

import pytest
import torch
from fairseq.modules.transformer_layer import TransformerDecoderLayerBase, TransformerEncoderLayerBase
from torch import nn

from fairseq_sparsemixer.plugin.models.moe_block import MoEDecoderLayer, MoEEncoderLayer, expert_dropout
from fairseq_sparsemixer.plugin.models.transformer_moe import TransformerMoEConfig


def small_config(**flags):
    cfg = TransformerMoEConfig(**{"num_experts": 1, "router": "switch", "jitter_eps": 0.0, "dropout": 0.0, **flags})
    for stack in (cfg.encoder, cfg.decoder):
        stack.embed_dim, stack.ffn_embed_dim, stack.attention_heads = 8, 16, 2
    return cfg


def copy_weights(ours, dense):
    """Copy the weights of fairseq's layer to ours, including its single expert."""
    experts = ours.fc1.moe.experts
    for name, parameter in ours.named_parameters():
        if not name.startswith("fc1."):
            parameter.data.copy_(dense.get_parameter(name))
    for linear, weight, bias in ((dense.fc1, "weight_in", "bias_in"), (dense.fc2, "weight_out", "bias_out")):
        getattr(experts, weight).data[0] = linear.weight.t()
        getattr(experts, bias).data[0] = linear.bias


@pytest.mark.parametrize("normalize_before", [False, True])
def test_with_one_expert_the_layer_equals_fairseqs_encoder_layer(normalize_before):
    cfg = small_config()
    cfg.encoder.normalize_before = normalize_before
    ours, dense = MoEEncoderLayer(cfg), TransformerEncoderLayerBase(cfg)
    copy_weights(ours, dense)
    x, padding = torch.randn(5, 3, 8), torch.zeros(3, 5, dtype=torch.bool)
    padding[1, 3:] = True
    real = ~padding.t()
    torch.testing.assert_close(ours(x, padding)[real], dense(x, padding)[real])


def test_with_one_expert_the_layer_equals_fairseqs_decoder_layer():
    cfg = small_config()
    ours, dense = MoEDecoderLayer(cfg), TransformerDecoderLayerBase(cfg)
    copy_weights(ours, dense)
    x, memory = torch.randn(4, 3, 8), torch.randn(5, 3, 8)
    torch.testing.assert_close(ours(x, memory)[0], dense(x, memory)[0])


def test_the_layer_routes_only_non_padding_tokens():
    layer = MoEEncoderLayer(small_config(num_experts=4))
    padding = torch.tensor([[False, False, True], [False, True, True]])
    layer(torch.randn(3, 2, 8), padding)
    assert layer.fc1.moe.routing.statistics()["tokens"].item() == 3
    assert layer.fc1.moe.routing.padding_mask.tolist() == padding.t().flatten().tolist()
    layer(torch.randn(3, 2, 8), None)
    assert layer.fc1.moe.routing.statistics()["tokens"].item() == 6


def test_activation_and_its_dropout_are_applied_only_inside_experts():
    layer = MoEDecoderLayer(small_config(activation_dropout=0.4))
    assert isinstance(layer.activation_dropout_module, nn.Identity) and isinstance(layer.fc2, nn.Identity)
    x = torch.randn(3)
    assert layer.activation_fn(x) is x
    assert layer.fc1.moe.experts.dropout == 0.4


@pytest.mark.parametrize("own, activation, relu, expected", [
    (0.4, 0.1, 0.2, 0.4), (0.0, 0.1, 0.2, 0.0), (None, 0.1, 0.2, 0.1), (None, 0.0, 0.2, 0.2), (None, 0.0, 0.0, 0.0),
])  # fmt: skip
def test_expert_dropout_defaults_to_fairseqs_activation_and_relu_dropout(own, activation, relu, expected):
    cfg = Namespace(expert_dropout=own, activation_dropout=activation, relu_dropout=relu)
    assert expert_dropout(cfg) == expected
