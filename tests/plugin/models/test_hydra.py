"""The names of options in a hydra config are checked."""

import pytest
from fairseq.models import build_model
from omegaconf import OmegaConf

from fairseq_sparsemixer.errors import ConfigurationError
from fairseq_sparsemixer.moe.layer import named_moe_layers
from fairseq_sparsemixer.plugin.models.hydra import check_option_names
from fairseq_sparsemixer.plugin.models.transformer_moe import TransformerMoEModel, base


def check(**options):
    check_option_names(OmegaConf.create({"_name": "transformer_moe_base", **options}), TransformerMoEModel, base)


def test_flags_and_architecture_settings_are_valid_options():
    check(num_experts=4, encoder_embed_dim=8, decoder_output_dim=8)


@pytest.mark.parametrize("name, remedy", [("num_expert", "did you mean num_experts"), ("zzz", "fairseq-train's flags")])
def test_any_other_name_is_refused_with_a_remedy(name, remedy):
    with pytest.raises(ConfigurationError, match=f"model.{name} is not an option of transformer_moe_base; .*{remedy}"):
        check(**{name: 1})


def build(yaml, task):
    """The tiny translation model of a YAML file's lines under `model`."""
    sizes = {"embed_dim": 16, "ffn_embed_dim": 32, "attention_heads": 2, "layers": 2}
    whole = {f"{stack}_{name}": value for stack in ("encoder", "decoder") for name, value in sizes.items()}
    given = OmegaConf.create({"_name": "transformer_moe_tiny", "num_experts": 4, **whole})
    return build_model(OmegaConf.merge(given, OmegaConf.create(yaml)), task)


@pytest.mark.parametrize("yaml, experts", [
    ("encoder_moe_layers: 1", {"encoder.layers.1": 4}),
    ("encoder_moe_layers: [0, 1]", {"encoder.layers.0": 4, "encoder.layers.1": 4}),
    ("encoder_moe_layers: ['0:2', 1]", {"encoder.layers.0": 2, "encoder.layers.1": 4}),
    ("encoder_moe_layers: 0:2,1:6", {"encoder.layers.0": 2, "encoder.layers.1": 6}),
    ("encoder_moe_layers: 0:2", {"encoder.layers.0": 2}),
    ("encoder_moe_layers: last:1", {"encoder.layers.1": 4}),
    ("encoder_moe_layers: 0\nencoder_layers_to_keep: 0", {"encoder.layers.0": 4}),
])  # fmt: skip
def test_layers_are_named_as_yaml_reads_them(yaml, experts, translation_task):
    model = build(f"{yaml}\ndecoder_moe_layers: none", translation_task)
    assert {name: layer.gate.num_experts for name, layer in named_moe_layers(model)} == experts


@pytest.mark.parametrize("yaml, message", [
    ("encoder_moe_layers: 1:8", "--encoder-moe-layers 68 names layer 68, .*; in a YAML file, write '1:8' with quotes"),
    ("encoder_moe_layers: {1: 8}", "--encoder-moe-layers {1: 8} must be a list such as"),
    ("router_option: {sampled: false}", "--router-option {'sampled': False} must be text; in a YAML file, write it with quotes"),
    ("freeze: [gate]", r"--freeze \['gate'\] must be text"),
    ("router: 3", "--router 3 must be text"),
    ("num_experts: '4'", "--num-experts '4' must be a number; in a YAML file, write it without quotes"),
    ("moe_cmr: 'false'", "--moe-cmr 'false' must be true or false; in a YAML file, write it without quotes"),
])  # fmt: skip
def test_values_that_yaml_reads_as_another_kind_are_refused(yaml, message, translation_task):
    with pytest.raises(ConfigurationError, match=message):
        build(yaml, translation_task)
