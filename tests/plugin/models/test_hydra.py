"""The names of options in a hydra config are checked."""

import pytest
from omegaconf import OmegaConf

from fairseq_sparsemixer.errors import ConfigurationError
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
