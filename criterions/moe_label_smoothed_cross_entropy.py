"""`moe_label_smoothed_cross_entropy`: fairseq's label_smoothed_cross_entropy with the routers' auxiliary losses."""

from dataclasses import dataclass

from fairseq.criterions import register_criterion
from fairseq.criterions.label_smoothed_cross_entropy import (
    LabelSmoothedCrossEntropyCriterion,
    LabelSmoothedCrossEntropyCriterionConfig,
)
from fairseq_sparsemixer.criterions.auxiliary_losses import AuxiliaryLossConfig, AuxiliaryLosses


@dataclass
class MoELabelSmoothedCrossEntropyCriterionConfig(AuxiliaryLossConfig, LabelSmoothedCrossEntropyCriterionConfig):
    """The flags of both."""


@register_criterion("moe_label_smoothed_cross_entropy", dataclass=MoELabelSmoothedCrossEntropyCriterionConfig)
class MoELabelSmoothedCrossEntropyCriterion(AuxiliaryLosses, LabelSmoothedCrossEntropyCriterion):
    """See AuxiliaryLosses and fairseq's LabelSmoothedCrossEntropyCriterion."""
