"""The expert feed-forward networks, stacked: each weight is one tensor for all experts.

Input rows [N, M] are grouped by expert; counts gives the N_e rows of each expert e, in order. feed_forward.py computes.
"""

import math
from typing import Any, Callable, Dict, Optional, Sequence, Union

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fairseq_sparsemixer.moe.feed_forward import Activation, Weights, feed_forward_by_expert
from fairseq_sparsemixer.moe.gradient_memory import GradBufferPool
from fairseq_sparsemixer.moe.grouped import feed_forward_grouped
from fairseq_sparsemixer.moe.kernels import choice, functions
from fairseq_sparsemixer.moe.lora import A, B, adapters, merged, scale_of


def geglu(inner: Tensor) -> Tensor:
    """inner [..., 2H] -> [..., H]: gelu of the first half times the second (arXiv 2002.05202)."""
    gate, linear = inner.chunk(2, dim=-1)
    return F.gelu(gate) * linear


def swiglu(inner: Tensor) -> Tensor:
    """As geglu, with silu."""
    gate, linear = inner.chunk(2, dim=-1)
    return F.silu(gate) * linear


ACTIVATIONS: Dict[str, Activation] = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu}
GATED_ACTIVATIONS: Dict[str, Activation] = {"geglu": geglu, "swiglu": swiglu}
KNOWN = {**ACTIVATIONS, **GATED_ACTIVATIONS}


class Experts(nn.Module):
    """E feed-forward networks M -> H -> M.

    Args: activation is a name in ACTIVATIONS or GATED_ACTIVATIONS (for the latter, the hidden layer is the product of an
    activated and a linear projection), or any parameter-free function of a tensor. dropout in [0, 1] acts on the hidden
    layer in training, and also at inference while `drop_at_inference` is set (Monte Carlo dropout). Raises ValueError
    for other values. While `recompute` is set, nothing within the experts is kept for the backward, which runs them again.
    """

    drop_at_inference = False
    recompute = False
    lora_scale: Optional[float] = None  # None without adapters; see lora.py

    def __init__(
        self,
        num_experts: int,
        model_dim: int,
        hidden_dim: int,
        activation: Union[str, Activation] = "relu",
        dropout: float = 0.0,
    ):
        super().__init__()
        self.num_experts = num_experts
        self.first_expert = 0
        self.gated = activation in GATED_ACTIVATIONS
        self.activation = resolve_activation(activation)
        self.activation_name = next((name for name, known in KNOWN.items() if known is self.activation), None)
        if not 0 <= dropout <= 1:
            raise ValueError(f"dropout={dropout} must lie in [0, 1]; 0 disables it")
        self.dropout = dropout
        self.gradient_memory = GradBufferPool()
        inner = 2 * hidden_dim if self.gated else hidden_dim
        self.weight_in = nn.Parameter(torch.empty(num_experts, model_dim, inner))  # [E, M, H]
        self.bias_in = nn.Parameter(torch.empty(num_experts, inner))
        self.weight_out = nn.Parameter(torch.empty(num_experts, hidden_dim, model_dim))  # [E, H, M]
        self.bias_out = nn.Parameter(torch.empty(num_experts, model_dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise each expert like two torch.nn.Linear: uniform within 1 / sqrt(fan in)."""
        for weight, bias in ((self.weight_in, self.bias_in), (self.weight_out, self.bias_out)):
            bound = 1 / math.sqrt(weight.size(1))
            nn.init.uniform_(weight, -bound, bound)
            nn.init.uniform_(bias, -bound, bound)

    def add_adapters(self, rank: int, alpha: Optional[float] = None) -> None:
        """Train adapters of this rank instead of the weights and biases; see lora.py. Raises ValueError for a rank below 1."""
        new = adapters(dict(self.named_parameters()), rank)
        self.requires_grad_(False)
        for name, parameter in new.items():
            self.register_parameter(name, parameter)
        self.lora_scale = scale_of(rank, alpha)

    def forward(self, rows: Tensor, counts: Union[Sequence[int], Tensor]) -> Tensor:
        """rows [N, M] grouped by expert -> [N, M]; counts [E] sum to N.

        If counts is a tensor (see takes_device_counts), it may sum to less; the remaining rows give zeros.
        """
        return self.run(self._feed_forward, rows, counts)

    def run(self, function: Callable[..., Tensor], *inputs: Any) -> Tensor:
        """function(*inputs), which runs again in the backward if `recompute` is set."""
        if self.recompute and self.training and torch.is_grad_enabled():
            out: Tensor = checkpoint(function, *inputs, use_reentrant=False)
            return out
        return function(*inputs)

    def _feed_forward(self, rows: Tensor, counts: Union[Sequence[int], Tensor]) -> Tensor:
        weights, dropout = self.weights(rows), self.current_dropout
        rows = rows.to(weights.weight_in.dtype)
        if torch.is_tensor(counts) and rows.size(0):  # torch's grouped product is not made for no rows (pytorch#192497)
            if self.activation_name and self.is_fused(rows):
                ends = counts.cumsum(0, dtype=torch.int32)
                return functions.feed_forward(rows, *weights, ends, self.activation_name, dropout)
            return feed_forward_grouped(rows, weights, counts, self.activation, dropout)
        counts = [0] * counts.numel() if torch.is_tensor(counts) else counts
        return feed_forward_by_expert(rows, weights, counts, self.activation, dropout, self.gradient_memory)

    def takes_device_counts(self, rows: Tensor) -> bool:
        """Whether counts can stay on the device of these rows, which avoids host synchronisation."""
        sizes = *self.weight_in.shape[1:], *self.weight_out.shape[1:]
        return self.is_fused(rows) or choice.can_group(rows.device, self.precision(rows), *sizes)

    def is_fused(self, rows: Tensor) -> bool:
        """Whether the fused kernels run for these rows."""
        return self.activation_name is not None and choice.fused(rows.device, self.precision(rows))

    def weights(self, rows: Tensor) -> Weights:
        """The weights in the precision of the computation, with their adapters."""
        weight_in, weight_out = self._adapted(self.weight_in, "in"), self._adapted(self.weight_out, "out")
        return Weights(weight_in, self.bias_in, weight_out, self.bias_out).to(self.precision(rows))

    def _adapted(self, weight: Tensor, part: str) -> Tensor:
        if self.lora_scale is None:
            return weight
        return merged(weight, self.get_parameter(A.format(part)), self.get_parameter(B.format(part)), self.lora_scale)

    @property
    def current_dropout(self) -> float:
        """The dropout of the hidden layer in the present mode."""
        return self.dropout if self.training or self.drop_at_inference else 0.0

    def precision(self, rows: Tensor) -> torch.dtype:
        """The compute dtype: autocast's if enabled, else that of `rows`, as torch.nn.functional.linear."""
        device = rows.device.type
        return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else rows.dtype

    def shard(self, first: int, count: int) -> None:
        """Keep `count` experts starting at `first`; other ranks hold the rest. Full checkpoints load into this shard."""
        self.first_expert = first
        for name, parameter in list(self.named_parameters()):
            own = parameter.detach().narrow(0, first, count).clone()
            setattr(self, name, nn.Parameter(own, parameter.requires_grad))

    def _load_from_state_dict(self, state_dict: Dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        for name, parameter in self.named_parameters():
            whole = state_dict.get(prefix + name)
            if whole is not None and whole.size(0) == self.num_experts:
                state_dict[prefix + name] = whole.narrow(0, self.first_expert, parameter.size(0))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def extra_repr(self) -> str:
        experts, model_dim, _ = self.weight_in.shape  # experts: in this shard
        return f"num_experts={experts}, model_dim={model_dim}, hidden_dim={self.weight_out.size(1)}, gated={self.gated}"


def resolve_activation(activation: Union[str, Activation]) -> Activation:
    """The activation function of that name. Raises ValueError for an unknown name or a module with parameters."""
    if isinstance(activation, nn.Module) and any(True for _ in activation.parameters()):
        raise ValueError(f"activation {activation} has parameters, which experts do not train; choose a plain function")
    if callable(activation):
        return activation
    if activation not in KNOWN:
        raise ValueError(f"activation={activation} is unknown; choose from {', '.join(KNOWN)}")
    return KNOWN[activation]
