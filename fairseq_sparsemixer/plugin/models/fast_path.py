"""Encoder layers without the duplicate weights that fairseq 0.12.2 keeps for torch's fused inference.

In that version, an encoder layer copies its weights into extra parameters when a state dict is loaded, and passes them to
torch._transformer_encoder_layer_fwd. An MoE layer has no such weights, torch 2 refuses that call, and the copies count as
parameters although nothing trains them. Earlier and later fairseq versions have no copies. With any version, our encoders
have one set of weights, and read checkpoints with and without the copies.
"""

import re
from typing import Any, Dict

import torch
from fairseq.modules.transformer_layer import TransformerEncoderLayerBase
from torch import Tensor, nn

COPIES = tuple(f"{layer}_{part}" for layer in ("in_proj", "out_proj", "fc1", "fc2") for part in ("weight", "bias"))
NAME_OF_COPY = re.compile(rf"(?:.*\.)?layers\.\d+\.(?:{'|'.join(COPIES)})")


def without_copies(state: Dict[str, Tensor]) -> Dict[str, Tensor]:
    """A model's state dict without the duplicate weights."""
    return {name: value for name, value in state.items() if not NAME_OF_COPY.fullmatch(name)}


def knows_copies() -> bool:
    """Whether the installed fairseq's encoder layers make these copies."""
    return "_load_from_state_dict" in vars(TransformerEncoderLayerBase)


class NoFastPath:
    """Mixin for an encoder layer, before fairseq's class."""

    def __init__(self, cfg: Any, return_fc: bool = False):
        super().__init__(cfg, return_fc=return_fc)  # type: ignore[call-arg]  # of the class behind this one
        if hasattr(self, "can_use_fastpath"):
            self.can_use_fastpath = False
            for name in COPIES:
                delattr(self, name)
                setattr(self, name, torch.empty(0))  # not a parameter; TorchScript also compiles the branch that uses it

    def _load_from_state_dict(self, state_dict: Dict[str, Tensor], prefix: str, *args) -> None:
        for name in COPIES:
            state_dict.pop(prefix + name, None)
        # skips fairseq's method, which would make the copies
        nn.Module._load_from_state_dict(self, state_dict, prefix, *args)  # type: ignore[arg-type]  # a layer, once mixed in


class DenseEncoderLayer(NoFastPath, TransformerEncoderLayerBase):
    """fairseq's encoder layer."""

    def __init__(self, cfg: Any, return_fc: bool = False):
        super().__init__(cfg, return_fc=return_fc)
        for dropout in (self.dropout_module, self.activation_dropout_module):
            dropout.module_name = TransformerEncoderLayerBase.__name__  # the name that --retain-dropout-modules matches
