"""`moe_masked_lm`: fairseq's masked_lm with the routers' auxiliary losses."""

from dataclasses import dataclass

from fairseq.criterions import register_criterion
from fairseq.criterions.masked_lm import MaskedLmConfig, MaskedLmLoss
from fairseq_sparsemixer.criterions.auxiliary_losses import AuxiliaryLossConfig, AuxiliaryLosses


@dataclass
class MoEMaskedLmConfig(AuxiliaryLossConfig, MaskedLmConfig):
    """The flags of both."""


@register_criterion("moe_masked_lm", dataclass=MoEMaskedLmConfig)
class MoEMaskedLmLoss(AuxiliaryLosses, MaskedLmLoss):
    """See AuxiliaryLosses and fairseq's MaskedLmLoss."""
