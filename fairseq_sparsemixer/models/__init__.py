"""fairseq models with Mixture-of-Experts layers. Each overrides fairseq's smallest hook; no forward is copied."""

from fairseq_sparsemixer.models.config import MoEOptions
from fairseq_sparsemixer.models.parameters import parameter_counts
from fairseq_sparsemixer.models.transformer_moe import TransformerMoEConfig, TransformerMoEModel

__all__ = ["MoEOptions", "TransformerMoEConfig", "TransformerMoEModel", "parameter_counts"]
