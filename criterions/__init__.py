"""fairseq's criterions, and ELECTRA's, with the routers' auxiliary losses and metrics."""

from fairseq_sparsemixer.criterions.electra import ElectraCriterion
from fairseq_sparsemixer.criterions.moe_adaptive_loss import MoEAdaptiveLoss
from fairseq_sparsemixer.criterions.moe_cross_entropy import MoECrossEntropyCriterion
from fairseq_sparsemixer.criterions.moe_label_smoothed_cross_entropy import MoELabelSmoothedCrossEntropyCriterion
from fairseq_sparsemixer.criterions.moe_masked_lm import MoEMaskedLmLoss
from fairseq_sparsemixer.criterions.moe_sentence_prediction import MoESentencePredictionCriterion

__all__ = [
    "ElectraCriterion",
    "MoEAdaptiveLoss",
    "MoECrossEntropyCriterion",
    "MoELabelSmoothedCrossEntropyCriterion",
    "MoEMaskedLmLoss",
    "MoESentencePredictionCriterion",
]
