"""The masked language model: which layers route, padding, initial weights, heads, bad flags."""

from argparse import Namespace

import pytest
import torch
from fairseq.models import build_model
from fairseq.models.roberta.model import RobertaModel
from omegaconf import OmegaConf

from fairseq_sparsemixer.errors import ConfigurationError
from fairseq_sparsemixer.moe.layer import named_moe_layers
from fairseq_sparsemixer.plugin.models import roberta_moe
from fairseq_sparsemixer.plugin.models.roberta_moe import RobertaMoEModel


def args_of(architecture=roberta_moe.tiny, **flags):
    args = Namespace(**{"tokens_per_sample": 32, "dropout": 0.0, "attention_dropout": 0.0, "num_experts": 4, **flags})
    architecture(args)
    return args


def build(task, **flags):
    return RobertaMoEModel.build_model(args_of(**flags), task)


def test_every_second_layer_has_experts_starting_with_the_first(masked_lm_task):
    model = build(masked_lm_task, encoder_layers=3)
    assert [name for name, _ in named_moe_layers(model)] == [
        "encoder.sentence_encoder.layers.0",
        "encoder.sentence_encoder.layers.2",
    ]


def test_router_dense_equals_fairseqs_model(masked_lm_task, masked_lm_batch):
    model = build(masked_lm_task, router="dense").eval()
    plain = RobertaModel.build_model(args_of(), masked_lm_task).eval()
    plain.load_state_dict(model.state_dict())
    tokens = masked_lm_batch(6, 3)["net_input"]["src_tokens"]
    assert torch.equal(model(tokens)[0], plain(tokens)[0])


def test_padding_is_never_routed_and_affects_no_token(masked_lm_task, masked_lm_batch):
    model = build(masked_lm_task).eval()
    tokens = masked_lm_batch(9, 4)["net_input"]["src_tokens"]
    together, _ = model(tokens)
    assert [layer.routing.statistics()["tokens"] for _, layer in named_moe_layers(model)] == [9 + 4]
    torch.testing.assert_close(together[1:, :4], model(tokens[1:, :4])[0], rtol=1e-5, atol=1e-6)


def test_experts_are_initialised_like_berts_layers(masked_lm_task):
    """Normal with standard deviation 0.02, biases zero (arXiv 1810.04805, section A.2, as fairseq's RoBERTa)."""
    ((_, layer),) = named_moe_layers(build(masked_lm_task))
    experts = layer.experts
    for weight in (experts.weight_in, experts.weight_out, layer.gate.projection.weight):
        assert weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert not experts.bias_in.any() and not experts.bias_out.any()


def test_sizes_equal_robertas():
    """arXiv 1907.11692, section 4 and table 9."""
    for architecture, layers, width in ((roberta_moe.base, 12, 768), (roberta_moe.large, 24, 1024)):
        args = args_of(architecture)
        assert (args.encoder_layers, args.encoder_embed_dim, args.encoder_ffn_embed_dim) == (layers, width, 4 * width)


@pytest.mark.parametrize("flag, value", [("ffn_reg_scale_factor", 0.1), ("ffn_blocks_to_remove", 2)])
def test_pruning_expert_layers_is_refused(masked_lm_task, flag, value):
    with pytest.raises(ConfigurationError, match=f"--{flag.replace('_', '-')} {value}.*--router dense"):
        build(masked_lm_task, **{flag: value})


def test_a_checkpoint_with_another_number_of_experts_is_refused(masked_lm_task):
    with pytest.raises(SystemExit, match="--num-experts 2 does not match the checkpoint, which has 4"):
        build(masked_lm_task, num_experts=2).load_state_dict(build(masked_lm_task).state_dict())


def test_a_checkpoint_with_another_maximum_length_is_refused(masked_lm_task):
    with pytest.raises(SystemExit, match="has 32 positions, but the flags say 40; give --max-positions 32"):
        build(masked_lm_task, max_positions=40).load_state_dict(build(masked_lm_task).state_dict())


def test_a_hydra_config_builds_the_model_and_unknown_names_are_refused(masked_lm_task):
    model = build_model(OmegaConf.create({"_name": "roberta_moe_tiny", "num_experts": 2}), masked_lm_task)
    assert [layer.gate.num_experts for _, layer in named_moe_layers(model)] == [2]
    assert not hasattr(model.args, "mha_reg_scale_factor")  # fairseq's criterion checks for it
    with pytest.raises(ConfigurationError, match="did you mean num_experts"):
        build_model(OmegaConf.create({"_name": "roberta_moe_tiny", "num_expert": 2}), masked_lm_task)
