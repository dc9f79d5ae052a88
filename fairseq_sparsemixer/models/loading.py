"""A checkpoint must hold the experts that the flags describe."""

from typing import Any, Dict, Optional

from torch import Tensor, nn

from fairseq_sparsemixer.checkpoints.layout import EXPERTS
from fairseq_sparsemixer.experts import Experts

GATE_PREFIX = ".moe.gate."


def check_checkpoint_fits(model: nn.Module, state_dict: Dict[str, Tensor]) -> None:
    """End with one sentence when state_dict's experts are not the model's.

    Raises SystemExit and nothing below it: fairseq's trainer turns every Exception here into advice about architectures.
    """
    expected = {name: value for name, value in model.state_dict().items() if EXPERTS in name}
    found = {name: value for name, value in state_dict.items() if EXPERTS in name}
    for name in sorted(set(expected) ^ set(found)):
        layer, holder, other = name.split(EXPERTS)[0], "checkpoint", "flags"
        if name in expected:
            holder, other = other, holder
        raise SystemExit(
            f"fairseq-sparsemixer: the {holder} has experts in {layer} and the {other} have none there;"
            " give the --router and --moe-freq the checkpoint was trained with"
        )
    layers = {name: module for name, module in model.named_modules() if isinstance(module, Experts)}
    _check_gates(model.state_dict(), state_dict)
    for name, value in expected.items():
        layer = name.split(EXPERTS)[0]
        whole, own, rows = layers[layer + EXPERTS[:-1]].num_experts, value.size(0), found[name].size(0)
        if rows not in (whole, own):  # a rank takes its own experts out of all, or is given them alone
            raise SystemExit(
                f"fairseq-sparsemixer: --num-experts {whole} does not match the checkpoint, which has {rows} experts in {layer}"
            )
        if value.shape[1:] != found[name].shape[1:]:
            raise SystemExit(
                f"fairseq-sparsemixer: {name} is {tuple(found[name].shape)} in the checkpoint and {tuple(value.shape)}"
                " by the flags; give the embedding and feed-forward sizes the checkpoint was trained with"
            )


def _check_gates(expected: Dict[str, Tensor], found: Dict[str, Tensor]) -> None:
    """Routers differ in what they learn beside the projection: SparseMixer has its omega."""
    for name in sorted({n for n in expected if GATE_PREFIX in n} ^ {n for n in found if GATE_PREFIX in n}):
        holder, other = ("flags", "checkpoint") if name in expected else ("checkpoint", "flags")
        flags = "the --router, with or without --router-bias," if name.endswith(".projection.bias") else "the --router"
        raise SystemExit(
            f"fairseq-sparsemixer: the router of the {holder} has {name} and that of the {other} has not;"
            f" give {flags} the checkpoint was trained with"
        )


class ChecksCheckpoints:
    """Mixed into a fairseq model, before its class: check_checkpoint_fits before anything is loaded."""

    def load_state_dict(
        self, state_dict: Dict[str, Tensor], strict: bool = True, model_cfg: Any = None, args: Optional[Any] = None
    ):
        """See BaseFairseqModel. Ends with one sentence when the checkpoint's experts do not match the flags."""
        check_checkpoint_fits(self, state_dict)
        return super().load_state_dict(state_dict, strict, model_cfg, args)
