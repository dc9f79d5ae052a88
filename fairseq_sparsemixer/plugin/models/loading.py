"""Checks that a checkpoint holds the experts that the flags describe."""

import copy
import logging
import re
from typing import Any, Dict, Optional

from fairseq.checkpoint_utils import prune_state_dict
from torch import Tensor, nn

from fairseq_sparsemixer.errors import ConfigurationError
from fairseq_sparsemixer.moe.experts import Experts
from fairseq_sparsemixer.moe.gates import DENSE
from fairseq_sparsemixer.names import ADAPTERS, CMR, EXPERTS, GATE, SHARED_EXPERTS
from fairseq_sparsemixer.plugin.models.architectures import settable
from fairseq_sparsemixer.plugin.models.config import layers_to_keep
from fairseq_sparsemixer.plugin.models.layer_choice import STACKS, layers_of_pruned

logger = logging.getLogger(__name__)


def check_checkpoint_fits(model: nn.Module, state_dict: Dict[str, Tensor]) -> None:
    """Raise ConfigurationError if state_dict's experts do not match the model's.

    fairseq's trainer replaces the error by advice about architectures; our trainer restores it.
    """
    expected = {name: value for name, value in model.state_dict().items() if EXPERTS in name}
    found = {name: value for name, value in state_dict.items() if EXPERTS in name}
    if expected and not found:
        raise ConfigurationError(
            "the checkpoint is dense, but the flags ask for experts; convert it by fairseq-sparsemixer upcycle"
            " DENSE.pt MOE.pt and start from MOE.pt, or use --router dense"
        )
    for name in sorted(set(expected) ^ set(found)):
        layer = name.split(EXPERTS)[0]
        difference = "the checkpoint has experts in {}, but the flags have none there"
        if name in expected:
            difference = "the flags have experts in {}, but the checkpoint has none there"
        raise ConfigurationError(
            f"{difference.format(layer)}; give the --router and --moe-freq (or --encoder-moe-layers, --decoder-moe-layers)"
            " the checkpoint was trained with"
        )
    _check_shared_experts(model.state_dict(), state_dict)
    _check_cmr(model.state_dict(), state_dict)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, Experts)}
    _check_gates(model.state_dict(), state_dict)
    for name, value in expected.items():
        layer = name.split(EXPERTS)[0]
        whole, own, rows = layers[layer + EXPERTS[:-1]].num_experts, value.size(0), found[name].size(0)
        if rows not in (whole, own):  # a rank slices its own experts out of all, or gets only its own
            raise ConfigurationError(f"--num-experts {whole} does not match the checkpoint, which has {rows} experts in {layer}")
        if value.shape[1:] != found[name].shape[1:]:
            raise ConfigurationError(
                f"{name} is {tuple(found[name].shape)} in the checkpoint, but {tuple(value.shape)}"
                " by the flags; give the embedding and feed-forward sizes the checkpoint was trained with"
            )


def _check_shared_experts(expected: Dict[str, Tensor], found: Dict[str, Tensor]) -> None:
    """Raise ConfigurationError if the shared experts, one network of their total width, differ in shape."""
    shapes = [{n: v.shape for n, v in state.items() if SHARED_EXPERTS in n} for state in (expected, found)]
    if shapes[0] == shapes[1]:
        return
    widths = [max((shape[-1] for name, shape in own.items() if name.endswith("bias_in")), default=0) for own in shapes]
    raise ConfigurationError(
        f"--num-shared-experts gives shared experts a total width of {widths[0]}, but the checkpoint's have {widths[1]} (0:"
        " none); give the --num-shared-experts and feed-forward sizes the checkpoint was trained with"
    )


def _check_cmr(expected: Dict[str, Tensor], found: Dict[str, Tensor]) -> None:
    """Raise ConfigurationError if one of both has CMR's shared networks and gates, and the other has not, or other sizes."""
    ours, theirs = ({name: value.shape for name, value in state.items() if CMR in name} for state in (expected, found))
    if ours.keys() != theirs.keys():
        holder, other, remedy = (
            ("flags have", "checkpoint has", "leave out") if ours else ("checkpoint has", "flags have", "give")
        )
        raise ConfigurationError(f"the {holder} --moe-cmr's shared networks, but the {other} not; {remedy} --moe-cmr")
    for name in (name for name in ours if ours[name] != theirs[name]):
        raise ConfigurationError(
            f"{name} is {tuple(theirs[name])} in the checkpoint, but {tuple(ours[name])} by the flags; give the"
            " feed-forward sizes the checkpoint was trained with"
        )


FLAG_OF_PARAMETER = {  # gate parameters whose presence depends on a flag
    ".balancer.bias": "the --router, with or without --moe-bias-update-rate,",
    ".projection.bias": "the --router, with or without --router-bias,",
}


def _check_gates(expected: Dict[str, Tensor], found: Dict[str, Tensor]) -> None:
    """Raise ConfigurationError if the routers have different parameters: SparseMixer, for example, has omega."""
    for name in sorted({n for n in expected if GATE in n} ^ {n for n in found if GATE in n}):
        holder, other = ("flags", "checkpoint") if name in expected else ("checkpoint", "flags")
        flags = next((flag for end, flag in FLAG_OF_PARAMETER.items() if name.endswith(end)), "the --router")
        raise ConfigurationError(
            f"the router of the {holder} has {name}, but that of the {other} has not;"
            f" give {flags} the checkpoint was trained with"
        )


def with_adapters(model: nn.Module, state_dict: Dict[str, Tensor]) -> Dict[str, Tensor]:
    """The checkpoint, with the model's own adapters of experts if it has none: training of them starts with it.

    Raises ConfigurationError if it has adapters and the model has none, or of another rank.
    """
    own, found = ({n: v for n, v in state.items() if ADAPTERS in n} for state in (model.state_dict(), state_dict))
    ranks = [next((value.size(-1) for name, value in each.items() if name.endswith("_a")), None) for each in (own, found)]
    if found and ranks[0] != ranks[1]:
        flags = "no --expert-lora-rank" if ranks[0] is None else f"--expert-lora-rank {ranks[0]}"
        raise ConfigurationError(
            f"the checkpoint has adapters of rank {ranks[1]}, but this run has {flags}; give --expert-lora-rank {ranks[1]}, or"
            " merge them into the experts: fairseq-sparsemixer convert --merge-lora IN OUT"
        )
    if not own or found or not any(EXPERTS in name for name in state_dict):
        return state_dict
    logger.info("the checkpoint has no adapters of experts: they start with B = 0, which changes no output")
    result = copy.copy(state_dict)  # with torch's metadata
    result.update(own)
    return result


def prune(state_dict: Dict[str, Tensor], model_cfg: Any) -> Dict[str, Tensor]:
    """Apply --encoder-layers-to-keep and --decoder-layers-to-keep to a trained model, renumbering layers as fairseq does.

    A stack without the flag keeps its layers, of which fairseq would keep none. model_cfg gets the settings of the pruned
    model, so that a checkpoint of further training holds them. Raises ConfigurationError for a layer that the checkpoint
    does not have.
    """
    kept = {stack: layers_to_keep(model_cfg, stack) for stack in STACKS} if model_cfg else {}
    if not any(kept.values()):
        return prune_state_dict(state_dict, model_cfg)
    for stack, wanted in kept.items():
        matches = (re.match(rf"{stack}\..*?layers\.(\d+)\.", name) for name in state_dict)
        there = {int(match.group(1)) for match in matches if match}
        for layer in wanted:
            if layer not in there:
                raise ConfigurationError(
                    f"--{stack}-layers-to-keep {','.join(map(str, wanted))} names layer {layer}, but those of the checkpoint"
                    f" are 0 to {max(there, default=-1)}; leave it out"
                )
        if there:
            _set(model_cfg, f"{stack}_layers_to_keep", ",".join(map(str, wanted or sorted(there))))
    result = prune_state_dict(state_dict, model_cfg)
    for stack, wanted in kept.items():
        if wanted and getattr(model_cfg, f"{stack}_layers_to_keep", None) is None:  # as fairseq does after pruning
            _set(model_cfg, f"{stack}_layers", len(wanted))
            if getattr(model_cfg, "router", DENSE) != DENSE:
                _set(model_cfg, f"{stack}_moe_layers", layers_of_pruned(model_cfg, stack, wanted))
    return result


def _set(model_cfg: Any, name: str, value: Any) -> None:
    with settable(model_cfg):
        setattr(model_cfg, name, value)


class ChecksCheckpoints:
    """Mixin for a fairseq model, before its class: calls check_checkpoint_fits before anything is loaded."""

    def load_state_dict(
        self, state_dict: Dict[str, Tensor], strict: bool = True, model_cfg: Any = None, args: Optional[Any] = None
    ):
        """See BaseFairseqModel. Raises ConfigurationError if the checkpoint's experts do not match the flags."""
        state_dict = with_adapters(self, prune(state_dict, model_cfg))  # type: ignore[arg-type]  # a model, once mixed in
        check_checkpoint_fits(self, state_dict)  # type: ignore[arg-type]  # a model, once mixed in
        return super().load_state_dict(state_dict, strict, model_cfg, args)  # type: ignore[misc]  # of the class behind this one
