"""`moe_cross_entropy`: fairseq's cross_entropy with the routers' auxiliary losses."""

from dataclasses import dataclass

from fairseq.criterions import register_criterion
from fairseq.criterions.cross_entropy import CrossEntropyCriterion, CrossEntropyCriterionConfig
from fairseq_sparsemixer.criterions.auxiliary_losses import AuxiliaryLossConfig, AuxiliaryLosses


@dataclass
class MoECrossEntropyCriterionConfig(AuxiliaryLossConfig, CrossEntropyCriterionConfig):
    """The flags of both."""


@register_criterion("moe_cross_entropy", dataclass=MoECrossEntropyCriterionConfig)
class MoECrossEntropyCriterion(AuxiliaryLosses, CrossEntropyCriterion):
    """See AuxiliaryLosses and fairseq's CrossEntropyCriterion."""
