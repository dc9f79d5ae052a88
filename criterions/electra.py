"""`electra`: the two losses of ELECTRA (Clark et al., 2020; arXiv 2003.10555), with the routers' auxiliary losses.

For a corpus of n tokens, of which the task masks a fraction p, the objective of section 2 is

    1 / (p n) * sum over masked tokens of the generator's cross-entropy
    + rtd_weight / n * sum over tokens of the discriminator's binary cross-entropy.

fairseq divides by n, so both sums add up over ranks and accumulated batches with any number of tokens.
"""

import math
from dataclasses import dataclass, field
from typing import Any, Dict, List

import torch.nn.functional as F
from fairseq import utils
from fairseq.criterions import FairseqCriterion, register_criterion
from fairseq.logging import metrics
from fairseq_sparsemixer.criterions.auxiliary_losses import AuxiliaryLossConfig, AuxiliaryLosses
from omegaconf import II
from torch import Tensor, nn

from fairseq_sparsemixer.errors import ConfigurationError
from fairseq_sparsemixer.ranges import NOT_NEGATIVE, Rule, broken_rule


@dataclass
class ElectraCriterionConfig(AuxiliaryLossConfig):
    """The flags of the criterion."""

    rtd_weight: float = field(
        default=50.0, metadata={"help": "weight of the discriminator's loss beside the generator's (paper: 50)"}
    )
    mask_prob: float = II("task.mask_prob")


class ElectraLoss(FairseqCriterion):
    """The two losses, without the routers'."""

    def __init__(self, task: Any, rtd_weight: float, mask_prob: float):
        super().__init__(task)
        masked = Rule(lambda x: 0 < x <= 1, "be above 0 and at most 1")
        for flag, value, rule in (("--rtd-weight", rtd_weight, NOT_NEGATIVE), ("--mask-prob", mask_prob, masked)):
            sentence = broken_rule(flag, value, rule)
            if sentence:
                raise ConfigurationError(sentence)
        self.rtd_weight, self.mask_prob = rtd_weight, mask_prob

    def forward(self, model: nn.Module, sample: Dict[str, Any], reduce: bool = True):
        """See FairseqCriterion.forward; the sample is from fairseq's masked_lm task, the sample size is its token count."""
        target, real = sample["target"], sample["net_input"]["src_tokens"].ne(self.padding_idx)
        output = model(**sample["net_input"], target=target)
        words, scores, replaced = target[target.ne(self.padding_idx)], output.scores[real].float(), output.replaced[real]
        mlm_loss = F.cross_entropy(output.generator_logits.float(), words, reduction="sum")
        rtd_loss = F.binary_cross_entropy_with_logits(scores, replaced.to(scores.dtype), reduction="sum")
        loss = mlm_loss / self.mask_prob + self.rtd_weight * rtd_loss
        log = {
            "loss": loss.detach(),
            "mlm_loss": mlm_loss.detach(),
            "rtd_loss": rtd_loss.detach(),
            "masked": words.numel(),
            "mlm_correct": output.generator_logits.argmax(-1).eq(words).sum(),
            **detection_counts(scores > 0, replaced),
            "ntokens": real.sum(),
            "nsentences": target.size(0),
            "sample_size": real.sum(),
        }
        return loss, log["sample_size"], log

    @classmethod
    def reduce_metrics(cls, logging_outputs: List[Dict[str, Any]]) -> None:
        """Log losses in bits, the generator's perplexity, and accuracies, precision and recall of the detection in %."""

        def total(name: str) -> Any:
            return utils.item(sum(log.get(name, 0) for log in logging_outputs))

        def log_ratio(name: str, part: str, whole: str, scale: float, digits: int) -> None:
            metrics.log_scalar(name, scale * total(part) / max(total(whole), 1), total(whole), round=digits)

        log_ratio("loss", "loss", "sample_size", 1 / math.log(2), 3)
        log_ratio("mlm_loss", "mlm_loss", "masked", 1 / math.log(2), 3)
        metrics.log_derived("ppl", lambda meters: utils.get_perplexity(meters["mlm_loss"].avg))
        log_ratio("rtd_loss", "rtd_loss", "ntokens", 1 / math.log(2), 4)
        log_ratio("mlm_accuracy", "mlm_correct", "masked", 100, 2)
        log_ratio("rtd_accuracy", "rtd_correct", "ntokens", 100, 2)
        log_ratio("rtd_precision", "rtd_hits", "rtd_flagged", 100, 2)
        log_ratio("rtd_recall", "rtd_hits", "replaced", 100, 2)

    @staticmethod
    def logging_outputs_can_be_summed() -> bool:
        """All entries are sums."""
        return True


def detection_counts(flagged: Tensor, replaced: Tensor) -> Dict[str, Tensor]:
    """flagged, replaced [n] bool -> counts of tokens flagged, replaced, correctly flagged, and correctly classified."""
    return {
        "rtd_flagged": flagged.sum(),
        "replaced": replaced.sum(),
        "rtd_hits": (flagged & replaced).sum(),
        "rtd_correct": flagged.eq(replaced).sum(),
    }


@register_criterion("electra", dataclass=ElectraCriterionConfig)
class ElectraCriterion(AuxiliaryLosses, ElectraLoss):
    """See AuxiliaryLosses and ElectraLoss."""
