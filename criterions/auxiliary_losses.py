"""A mixin for any fairseq criterion: adds the routers' auxiliary losses to its loss, and their metrics to its log.

The logged `loss` is the criterion's own, so that it is comparable to a dense model's. The gradient is that of

    loss + sample_size * (sum over layers of (balance_weight * balance + z_weight * router_z) + cmr_weight * budget).

fairseq divides the summed gradient by the summed sample size, so gradient accumulation and data parallelism average the
auxiliary losses weighted by sample size, for any number of batches.
"""

import logging
from dataclasses import dataclass, field
from typing import Any, Dict, List, Optional, Sequence, Union

from fairseq.criterions import CRITERION_REGISTRY
from fairseq.dataclass import FairseqDataclass
from fairseq_sparsemixer.criterions.language_load import SentenceLanguages, language_load
from fairseq_sparsemixer.criterions.load_log import LoadLog
from fairseq_sparsemixer.criterions.metrics import log_routing_metrics, routing_log, sum_routing_logs
from torch import Tensor, nn

from fairseq_sparsemixer.errors import ConfigurationError
from fairseq_sparsemixer.moe.cmr import budget_loss
from fairseq_sparsemixer.moe.gates.balance_scope import UpdateScope
from fairseq_sparsemixer.moe.layer import MoELayer, named_moe_layers
from fairseq_sparsemixer.ranges import COUNT, NOT_NEGATIVE, Rule, broken_rule

logger = logging.getLogger(__name__)

BY_LANGUAGE = "moe_language_load"  # of our entries in a logging output, which the metrics leave out


@dataclass
class AuxiliaryLossConfig(FairseqDataclass):
    """The flags that the mixin adds to a criterion."""

    moe_balance_loss_weight: float = field(
        default=0.01, metadata={"help": "weight of the load-balancing loss, summed over MoE layers (paper: 0.01)"}
    )
    moe_z_loss_weight: float = field(
        default=0.0, metadata={"help": "weight of the router z-loss, summed over MoE layers (ST-MoE: 0.001)"}
    )
    moe_cmr_budget: float = field(default=0.8, metadata={"help": "--moe-cmr: target mean of the gate over tokens and MoE layers"})
    moe_cmr_loss_weight: float = field(
        default=0.1, metadata={"help": "--moe-cmr: weight of the budget loss, the distance of that mean from --moe-cmr-budget"}
    )
    moe_load_file: Optional[str] = field(
        default=None, metadata={"help": "append the training tokens per expert to this file, as JSON lines"}
    )
    moe_load_interval: int = field(default=100, metadata={"help": "updates per line of --moe-load-file"})
    moe_log_layers: bool = field(
        default=False, metadata={"help": "also log the routers' metrics of each MoE layer, as encoder.layers.0/moe_load_max"}
    )
    moe_load_languages: Optional[str] = field(
        default=None,
        metadata={
            "help": "also count the tokens in --moe-load-file by language: source, target or pair, known through language tokens"
            " (--encoder-langtok, --decoder-langtok; tags such as <2de> in front of source sentences)"
        },
    )


class AuxiliaryLosses:
    """Mixin; must precede a FairseqCriterion in the bases. The criterion's dataclass extends AuxiliaryLossConfig."""

    aux_weights: Dict[str, float]
    balance_weight: float
    cmr_budget: float
    cmr_weight: float

    @classmethod
    def build_criterion(cls, cfg: AuxiliaryLossConfig, task: Any):
        """See FairseqCriterion. Raises ConfigurationError for numbers out of range."""
        for name, rule in cls.NUMBERS.items():
            sentence = broken_rule(f"--{name.replace('_', '-')}", getattr(cfg, name), rule)
            if sentence:
                raise ConfigurationError(sentence)
        # fairseq calls reduce_metrics on the class, so each criterion gets a subclass that carries its load log
        state = {**_load_log(cfg, task), "logged_layers": [] if cfg.moe_log_layers else None}
        own = type(cls.__name__, (cls,), state)
        criterion = super().build_criterion.__func__(own, cfg, task)  # type: ignore[misc]  # of the class behind this one
        criterion.aux_weights = {"router_z": cfg.moe_z_loss_weight, "l1": 1.0}  # remoe adapts the weight of l1 itself
        criterion.balance_weight = cfg.moe_balance_loss_weight
        criterion.cmr_budget, criterion.cmr_weight = cfg.moe_cmr_budget, cfg.moe_cmr_loss_weight
        return criterion

    NUMBERS = {  # allowed ranges of the flags
        "moe_balance_loss_weight": NOT_NEGATIVE,
        "moe_z_loss_weight": NOT_NEGATIVE,
        "moe_cmr_budget": Rule(lambda x: 0 <= x <= 1, "be at least 0 and at most 1"),
        "moe_cmr_loss_weight": NOT_NEGATIVE,
        "moe_load_interval": COUNT,
    }
    load_log: Optional[LoadLog] = None
    logged_layers: Optional[List[str]] = None  # the names of the layers, once known; None without --moe-log-layers
    languages: Optional[SentenceLanguages] = None

    def forward(self, model: nn.Module, sample: Dict[str, Any], reduce: bool = True):
        """See FairseqCriterion.forward: (loss with the auxiliary losses, sample size, logging output without)."""
        layers = named_moe_layers(model)
        for _, layer in layers:
            layer.routing = None  # a layer skipped by LayerDrop must not report its last batch again
        loss, sample_size, logging_output = super().forward(model, sample, reduce)  # type: ignore[misc]  # as above
        if not layers:
            return loss, sample_size, logging_output
        budget = self.budget_loss([layer for _, layer in layers])
        logging_output.update(routing_log([layer for _, layer in layers], sample_size, {"cmr": budget}))
        if self.load_log is not None:
            self.load_log.watch([name for name, _ in layers], getattr(model, "num_updates", 0) if model.training else None)
        if self.logged_layers is not None:
            self.logged_layers[:] = [name for name, _ in layers]  # the list of the class, for reduce_metrics
        if self.languages is not None and model.training:
            logging_output[BY_LANGUAGE] = language_load(layers, self.languages, sample)
        if reduce:
            loss = loss + self.auxiliary_loss([layer for _, layer in layers], sample_size, budget)
        return loss, sample_size, logging_output

    def auxiliary_loss(self, layers: List[MoELayer], sample_size: Any, budget: Optional[Tensor] = None) -> Union[Tensor, int]:
        """The weighted sum over the layers that ran, and of the budget loss, times the sample size: a differentiable scalar.

        Losses not in aux_weights use balance_weight. Those that follow --balance-scope have the sample size of their scope.
        """
        scope, scoped_size = layers[0].gate.balance_scope, sample_size
        if isinstance(scope, UpdateScope):
            scoped_size = scope.update.weigh(sample_size, layers[0].idle)
        if layers[0].cmr is not None and not layers[0].cmr.gate.bias.requires_grad:
            budget = None  # frozen, as the gates in weighted_sum
        scoped = self.weighted_sum(layers, but=["router_z"]) + (0 if budget is None else self.cmr_weight * budget)
        return sample_size * self.weighted_sum(layers, ["router_z"]) + scoped_size * scoped

    def weighted_sum(
        self, layers: List[MoELayer], names: Optional[Sequence[str]] = None, but: Sequence[str] = ()
    ) -> Union[Tensor, int]:
        """The losses times their weights, of the given names only, of gates that are trained.

        A weight of 0 leaves out even an infinite loss.
        """
        weighed = (
            (self.aux_weights.get(name, self.balance_weight), loss)
            for layer in layers
            if layer.routing is not None and not layer.gate.frozen
            for name, loss in layer.routing.aux_losses.items()
            if (names is None or name in names) and name not in but
        )
        return sum(weight * loss for weight, loss in weighed if weight)

    def budget_loss(self, layers: List[MoELayer]) -> Optional[Tensor]:
        """The unweighted budget loss of --moe-cmr: a differentiable scalar; None for a model without it.

        Its mean is over the tokens of the layers that ran, and of other forwards as --balance-scope says.
        """
        first = layers[0]
        if first.cmr is None:
            return None
        ran, scope = [layer.routing for layer in layers if layer.routing is not None], first.gate.balance_scope
        if not ran:
            return first.cmr.gate.bias.new_zeros(())
        return budget_loss(ran, self.cmr_budget, None if scope is None else scope.of_model())

    @classmethod
    def reduce_metrics(cls, logging_outputs: List[Dict[str, Any]]) -> None:
        """fairseq's own metrics, then the routers'."""
        super().reduce_metrics(logging_outputs)  # type: ignore[misc]  # of the class behind this one
        totals = sum_routing_logs(logging_outputs)
        if totals:
            log_routing_metrics(totals, sum(log.get("sample_size", 0) for log in logging_outputs), cls.logged_layers or ())
            if cls.load_log is not None:
                by_language = [log[BY_LANGUAGE] for log in logging_outputs if BY_LANGUAGE in log]
                cls.load_log.add(totals["load"].sum(1), sum(by_language) if by_language else None)


def _load_log(cfg: AuxiliaryLossConfig, task: Any) -> Dict[str, Any]:
    """The load log of a criterion and the languages in it, None without. Raises ConfigurationError."""
    if cfg.moe_load_languages and not cfg.moe_load_file:
        raise ConfigurationError(f"--moe-load-languages {cfg.moe_load_languages} needs a file; give --moe-load-file, too")
    if not cfg.moe_load_file:
        return {"load_log": None, "languages": None}
    wanted = cfg.moe_load_languages
    languages = SentenceLanguages(task, wanted, f"--moe-load-languages {wanted}") if wanted else None
    return {
        "load_log": LoadLog(cfg.moe_load_file, cfg.moe_load_interval, languages and languages.names),
        "languages": languages,
    }


def warn_of_plain_criterion(criterion: nn.Module, name: str) -> None:
    """Warn if a model with experts uses a criterion without auxiliary losses; `name` is its --criterion."""
    if isinstance(criterion, AuxiliaryLosses):
        return
    known = sorted(other for other, cls in CRITERION_REGISTRY.items() if issubclass(cls, AuxiliaryLosses))
    logger.warning(
        "--criterion %s leaves out the routers' load-balancing losses and metrics, so experts may collapse unnoticed;"
        " use --criterion %s", name, f"moe_{name}" if f"moe_{name}" in known else " or ".join(known),
    )  # fmt: skip
