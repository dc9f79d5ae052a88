"""The architectures are fairseq's, with experts added."""

from argparse import Namespace

import pytest
from fairseq.models import ARCH_CONFIG_REGISTRY, ARCH_MODEL_REGISTRY
from fairseq.models.transformer import transformer_legacy
from omegaconf import OmegaConf

from fairseq_sparsemixer.plugin.models import MoEOptions, TransformerMoEModel
from fairseq_sparsemixer.plugin.models.architectures import fill_defaults

SAME = {
    "transformer_moe": transformer_legacy.base_architecture,
    "transformer_moe_base": transformer_legacy.base_architecture,
    "transformer_moe_tiny": transformer_legacy.tiny_architecture,
    "transformer_moe_iwslt": transformer_legacy.transformer_iwslt_de_en,
    "transformer_moe_big": transformer_legacy.transformer_vaswani_wmt_en_de_big,
}


@pytest.mark.parametrize("name", sorted(SAME))
def test_an_architecture_has_fairseqs_defaults_and_the_papers_experts(name):
    ours, theirs = Namespace(), Namespace()
    ARCH_CONFIG_REGISTRY[name](ours)
    SAME[name](theirs)
    assert ARCH_MODEL_REGISTRY[name] is TransformerMoEModel
    assert {key: value for key, value in vars(ours).items() if key in vars(theirs)} == vars(theirs)
    assert (ours.router, ours.num_experts, ours.moe_freq, ours.jitter_eps) == ("sparsemixer", 8, 2, 0.1)


def test_a_given_flag_is_kept():
    args = Namespace(num_experts=3)
    fill_defaults(args, MoEOptions)
    assert (args.num_experts, args.router) == (3, "sparsemixer")


def test_a_hydra_config_gets_the_same_defaults_as_flags_and_keeps_its_values():
    config, flags = OmegaConf.create({"encoder_layers": 3, "dropout": None}), Namespace(encoder_layers=3, dropout=None)
    ARCH_CONFIG_REGISTRY["transformer_moe_tiny"](config)  # in omegaconf 2.0, a config returns None for missing keys
    ARCH_CONFIG_REGISTRY["transformer_moe_tiny"](flags)
    assert {name: config[name] for name in config} == {**vars(flags), "base_layers": 0}
