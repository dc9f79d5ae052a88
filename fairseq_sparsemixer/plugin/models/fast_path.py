"""Encoder layers without the second set of weights that fairseq 0.12.2 keeps for torch's fused inference.

There, an encoder layer copies its weights when a state dict is loaded, into parameters of its own, and calls
torch._transformer_encoder_layer_fwd with them. An MoE layer has no such weights, that call is refused by torch 2, and the
copies count as parameters, which nothing trains. Earlier and later versions of fairseq have none of it. Whichever is
installed, our encoders have one set of weights, and read checkpoints with and without the copies.
"""

import re
from typing import Any, Dict

import torch
from fairseq.modules.transformer_layer import TransformerEncoderLayerBase
from torch import Tensor, nn

COPIES = tuple(f"{layer}_{part}" for layer in ("in_proj", "out_proj", "fc1", "fc2") for part in ("weight", "bias"))
NAME_OF_COPY = re.compile(rf"(?:.*\.)?layers\.\d+\.(?:{'|'.join(COPIES)})")


def without_copies(state: Dict[str, Tensor]) -> Dict[str, Tensor]:
    """A model's state dict less what is there twice."""
    return {name: value for name, value in state.items() if not NAME_OF_COPY.fullmatch(name)}


def knows_copies() -> bool:
    """Whether the installed fairseq's encoder layers make the copies themselves."""
    return "_load_from_state_dict" in vars(TransformerEncoderLayerBase)


class NoFastPath:
    """Mixed into an encoder layer, before fairseq's class."""

    def __init__(self, cfg: Any, return_fc: bool = False):
        super().__init__(cfg, return_fc=return_fc)  # type: ignore[call-arg]  # of the class behind this one
        if hasattr(self, "can_use_fastpath"):
            self.can_use_fastpath = False
            for name in COPIES:
                delattr(self, name)
                setattr(self, name, torch.empty(0))  # no parameter; TorchScript compiles the branch that names it, too

    def _load_from_state_dict(self, state_dict: Dict[str, Tensor], prefix: str, *args) -> None:
        for name in COPIES:
            state_dict.pop(prefix + name, None)
        # past fairseq's, which would make the copies
        nn.Module._load_from_state_dict(self, state_dict, prefix, *args)  # type: ignore[arg-type]  # a layer, once mixed in


class DenseEncoderLayer(NoFastPath, TransformerEncoderLayerBase):
    """fairseq's encoder layer."""

    def __init__(self, cfg: Any, return_fc: bool = False):
        super().__init__(cfg, return_fc=return_fc)
        for dropout in (self.dropout_module, self.activation_dropout_module):
            dropout.module_name = TransformerEncoderLayerBase.__name__  # by which --retain-dropout-modules knows it
