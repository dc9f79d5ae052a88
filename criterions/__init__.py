"""fairseq's criterions with the routers' auxiliary losses and metrics added."""

from fairseq_sparsemixer.criterions.moe_cross_entropy import MoECrossEntropyCriterion
from fairseq_sparsemixer.criterions.moe_label_smoothed_cross_entropy import MoELabelSmoothedCrossEntropyCriterion

__all__ = ["MoECrossEntropyCriterion", "MoELabelSmoothedCrossEntropyCriterion"]
