"""Encoder layers of a fairseq with a second set of weights, like 0.12.2; simulated, so that the tests run on any fairseq."""

from argparse import Namespace

import pytest
import torch
from fairseq.models.transformer import TransformerModel, transformer_legacy
from fairseq.modules.transformer_layer import TransformerEncoderLayerBase
from torch import nn

from fairseq_sparsemixer.plugin.models.fast_path import COPIES, DenseEncoderLayer, NoFastPath, without_copies
from fairseq_sparsemixer.plugin.models.moe_block import MoEEncoderLayer
from fairseq_sparsemixer.plugin.models.transformer_moe import TransformerMoEConfig


class StockLayer(TransformerEncoderLayerBase):
    """Simulates fairseq 0.12.2's layer, which reads the weights of fc1 and fc2, and copies them when a state is loaded."""

    def __init__(self, cfg, return_fc=False):
        super().__init__(cfg, return_fc=return_fc)
        for name, weight in self.originals().items():
            setattr(self, name, nn.Parameter(torch.zeros(weight.shape)))
        self.can_use_fastpath, self.load_to_BT = True, False

    def originals(self):
        attention = [self.self_attn.q_proj, self.self_attn.k_proj, self.self_attn.v_proj]
        parts = {
            "in_proj_weight": torch.cat([p.weight for p in attention]),
            "in_proj_bias": torch.cat([p.bias for p in attention]),
        }
        for name, layer in (("out_proj", self.self_attn.out_proj), ("fc1", self.fc1), ("fc2", self.fc2)):
            parts.update({f"{name}_weight": layer.weight, f"{name}_bias": layer.bias})
        return parts

    def _load_from_state_dict(self, state_dict, prefix, *args):
        self.load_to_BT = True
        for name in ("fc1", "fc2"):
            state_dict[f"{prefix}{name}_weight"] = state_dict[f"{prefix}{name}.weight"]  # a KeyError for an MoE layer
        super()._load_from_state_dict(state_dict, prefix, *args)


class Dense(NoFastPath, StockLayer):
    pass


class MoE(MoEEncoderLayer, StockLayer):
    pass


def config(**flags):
    cfg = TransformerMoEConfig(router="switch", num_experts=2, dropout=0.0, **flags)
    cfg.encoder.embed_dim, cfg.encoder.ffn_embed_dim, cfg.encoder.attention_heads = 8, 16, 2
    return cfg


@pytest.mark.parametrize("layer_class", [Dense, MoE])
def test_a_layer_has_one_set_of_weights_and_no_fused_path(layer_class):
    layer = layer_class(config())
    assert not layer.can_use_fastpath and not layer.load_to_BT
    names = {name for name, _ in layer.named_parameters()}
    assert names.isdisjoint(COPIES) and set(layer.state_dict()) == names
    layer(torch.randn(3, 2, 8), None).sum().backward()
    experts = "fc1.moe.gate.projection.weight"
    assert all(p.grad is not None for name, p in layer.named_parameters() if name != experts)


@pytest.mark.parametrize("layer_class", [Dense, MoE])
@pytest.mark.parametrize("with_copies", [False, True])
def test_a_layer_loads_states_with_and_without_copies(layer_class, with_copies):
    layer, other = layer_class(config()), layer_class(config())
    state = other.state_dict()
    if with_copies:
        state.update({name: torch.zeros(3) for name in COPIES})
    layer.load_state_dict(state)
    assert not layer.load_to_BT
    x = torch.randn(3, 2, 8)
    assert torch.equal(layer.eval()(x, None), other.eval()(x, None))


def test_a_layer_without_copies_equals_fairseqs():
    ours, theirs = DenseEncoderLayer(config()), TransformerEncoderLayerBase(config())
    ours.load_state_dict({name: value for name, value in theirs.state_dict().items() if name not in COPIES})
    x, padding = torch.randn(3, 2, 8), torch.tensor([[False, False, True], [False, False, False]])
    assert torch.equal(ours(x, padding), theirs(x, padding))
    assert ours.dropout_module.module_name == theirs.dropout_module.module_name == "TransformerEncoderLayerBase"


def test_only_the_names_of_copies_are_removed():
    state = {
        "encoder.layers.0.fc1_weight": 1,
        "encoder.sentence_encoder.layers.11.in_proj_bias": 2,
        "layers.3.out_proj_weight": 3,
    }
    kept = {"encoder.layers.0.fc1.weight": 4, "encoder.layers.0.self_attn.in_proj_weight": 5, "decoder.fc1_weight": 6}
    assert without_copies({**state, **kept}) == kept


def test_fairseqs_dense_models_with_copies_load_into_ours(build_translation_model, translation_task, translation_batch):
    sizes = dict(encoder_layers=2, decoder_layers=2, encoder_embed_dim=16, encoder_ffn_embed_dim=32, encoder_attention_heads=2)
    args = Namespace(**sizes, decoder_embed_dim=16, decoder_ffn_embed_dim=32, decoder_attention_heads=2, dropout=0.0)
    transformer_legacy.tiny_architecture(args)
    theirs, ours = TransformerModel.build_model(args, translation_task), build_translation_model(router="dense")
    state = theirs.state_dict()
    for layer in range(2):
        state.update({f"encoder.layers.{layer}.{name}": torch.zeros(3) for name in COPIES})
    ours.load_state_dict(state)
    inputs = translation_batch(3, 6, 5)["net_input"]
    torch.testing.assert_close(ours.eval()(**inputs)[0], theirs.train()(**inputs)[0])
