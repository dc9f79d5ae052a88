"""Conditional MoE routing (CMR) in checkpoints of fairseq's branch nllb: the names of its tensors.

Names in a layer P, theirs on the left; they are in the shared file:

    P.fc1.weight [H, M], .bias [H]                  fc1.moe.cmr.shared.weight_in [1, M, H], bias_in [1, H]
    P.fc2.weight [M, H], .bias [M]                  fc1.moe.cmr.shared.weight_out [1, H, M], bias_out [1, M]
    P.cmr_layer.gate.wg.weight [1, M], .bias [1]    fc1.moe.cmr.gate.weight, .bias
    P.cmr_layer.moe_layer.*                         second names of P.moe_layer.*, left out
    P.cmr_layer.lang_idx                            the languages that its log counts, left out
"""

from typing import Dict

from torch import Tensor

from fairseq_sparsemixer.errors import ConfigurationError
from fairseq_sparsemixer.names import LAYER

MARK, COPIES, LANGUAGES = ".cmr_layer.gate.wg.weight", ".cmr_layer.moe_layer.", ".cmr_layer.lang_idx"
GATE = {"cmr_layer.gate.wg.weight": "gate.weight", "cmr_layer.gate.wg.bias": "gate.bias"}
SHARED = {"fc1.weight": "weight_in", "fc1.bias": "bias_in", "fc2.weight": "weight_out", "fc2.bias": "bias_out"}


def without_cmr_copies(weights: Dict[str, Tensor]) -> Dict[str, Tensor]:
    """The weights without the tensors of CMR that are there twice, or that only its log uses."""
    return {name: value for name, value in weights.items() if COPIES not in name and not name.endswith(LANGUAGES)}


def rename_cmr(weights: Dict[str, Tensor], given: bool) -> Dict[str, Tensor]:
    """The weights of a shared file, with those of CMR under our names. Raises ConfigurationError if --moe-cmr was not given."""
    result, layers = dict(weights), [name[: -len(MARK)] for name in weights if name.endswith(MARK)]
    if layers and not given:
        raise ConfigurationError(f"the checkpoint has {layers[0]}{MARK}, but its arguments lack --moe-cmr; use an unchanged one")
    for layer in layers:
        for theirs, part in GATE.items():
            _move(result, f"{layer}.{theirs}", f"{layer}{LAYER}.cmr.{part}")
        for theirs, part in SHARED.items():
            _move(result, f"{layer}.{theirs}", f"{layer}{LAYER}.cmr.shared.{part}", stack=True)
    return result


def _move(weights: Dict[str, Tensor], theirs: str, ours: str, stack: bool = False) -> None:
    """Rename a tensor that is there; stack: as the only expert of a stack. t() leaves a bias unchanged."""
    if theirs in weights:
        tensor = weights.pop(theirs)
        weights[ours] = tensor.t().unsqueeze(0).contiguous() if stack else tensor
