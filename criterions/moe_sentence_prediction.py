"""`moe_sentence_prediction`: fairseq's sentence_prediction with the routers' auxiliary losses."""

from dataclasses import dataclass

from fairseq.criterions import register_criterion
from fairseq.criterions.sentence_prediction import SentencePredictionConfig, SentencePredictionCriterion
from fairseq_sparsemixer.criterions.auxiliary_losses import AuxiliaryLossConfig, AuxiliaryLosses


@dataclass
class MoESentencePredictionConfig(AuxiliaryLossConfig, SentencePredictionConfig):
    """The flags of both."""


@register_criterion("moe_sentence_prediction", dataclass=MoESentencePredictionConfig)
class MoESentencePredictionCriterion(AuxiliaryLosses, SentencePredictionCriterion):
    """See AuxiliaryLosses and fairseq's SentencePredictionCriterion."""

    def logging_outputs_can_be_summed(self) -> bool:
        """False if a score needs every prediction: fairseq's --report-* flags log them as lists, which ranks gather."""
        return not getattr(self, "keep_pred_and_targ", False)
