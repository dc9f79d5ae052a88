"""fairseq models with Mixture-of-Experts layers. Each overrides fairseq's smallest hook; no forward is copied."""

from fairseq_sparsemixer.options import MoEOptions
from fairseq_sparsemixer.plugin.models.electra_moe import ElectraMoEModel
from fairseq_sparsemixer.plugin.models.parameters import parameter_counts
from fairseq_sparsemixer.plugin.models.roberta_moe import RobertaMoEModel
from fairseq_sparsemixer.plugin.models.transformer_lm_moe import TransformerLanguageModelMoE, TransformerLanguageModelMoEConfig
from fairseq_sparsemixer.plugin.models.transformer_moe import TransformerMoEConfig, TransformerMoEModel

__all__ = [
    "ElectraMoEModel",
    "MoEOptions",
    "RobertaMoEModel",
    "TransformerLanguageModelMoE",
    "TransformerLanguageModelMoEConfig",
    "TransformerMoEConfig",
    "TransformerMoEModel",
    "parameter_counts",
]
