"""`moe_adaptive_loss`: fairseq's adaptive_loss (for models with an adaptive softmax) with the routers' auxiliary losses."""

from dataclasses import dataclass
from typing import Any, Dict

from fairseq.criterions import register_criterion
from fairseq.criterions.adaptive_loss import AdaptiveLoss, AdaptiveLossConfig
from fairseq_sparsemixer.criterions.auxiliary_losses import AuxiliaryLossConfig, AuxiliaryLosses
from torch import nn

from fairseq_sparsemixer.errors import ConfigurationError
from fairseq_sparsemixer.names import PYTORCH_DDP


@dataclass
class MoEAdaptiveLossConfig(AuxiliaryLossConfig, AdaptiveLossConfig):
    """The flags of both."""


@register_criterion("moe_adaptive_loss", dataclass=MoEAdaptiveLossConfig)
class MoEAdaptiveLoss(AuxiliaryLosses, AdaptiveLoss):
    """See AuxiliaryLosses and fairseq's AdaptiveLoss."""

    @classmethod
    def build_criterion(cls, cfg: MoEAdaptiveLossConfig, task: Any):
        """See AuxiliaryLosses. Raises ConfigurationError for the DDP backend that fairseq's AdaptiveLoss refuses."""
        if cfg.ddp_backend in PYTORCH_DDP:
            raise ConfigurationError(
                f"--ddp-backend {cfg.ddp_backend} does not work with an adaptive softmax, which may leave a cluster of rare words"
                " without gradient; use --ddp-backend legacy_ddp"
            )
        return super().build_criterion(cfg, task)

    def forward(self, model: nn.Module, sample: Dict[str, Any], reduce: bool = True):
        """See AuxiliaryLosses. Raises ConfigurationError for a model without adaptive softmax."""
        if getattr(model.decoder, "adaptive_softmax", None) is None:
            raise ConfigurationError(
                "--criterion moe_adaptive_loss is for models with --adaptive-softmax-cutoff; use --criterion moe_cross_entropy"
            )
        return super().forward(model, sample, reduce)
