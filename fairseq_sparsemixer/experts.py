"""The expert feed-forward networks, stacked so that one tensor holds a weight of all experts.

Rows arrive grouped by expert: rows [N, M] and counts, N_e rows for each expert e in order.
"""

import math
from typing import Callable, Dict, List, Sequence, Tuple, Union

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ACTIVATIONS: Dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu}
GATED_ACTIVATIONS: Dict[str, Callable[[Tensor], Tensor]] = {"geglu": F.gelu, "swiglu": F.silu}


class _GroupedLinear(torch.autograd.Function):
    """rows [N, I] grouped by expert, weight [E, I, O], bias [E, O] -> [N, O], one matrix product an expert in use.

    Gradients are written straight into one buffer for all experts; only the rows of idle experts are zero-filled.
    """

    @staticmethod
    def forward(ctx, rows: Tensor, weight: Tensor, bias: Tensor, counts: Sequence[int]) -> Tensor:
        ctx.save_for_backward(rows, weight)
        ctx.counts = counts
        out = rows.new_empty(rows.size(0), weight.size(2))
        for expert, start, stop in _groups(counts):
            torch.addmm(bias[expert], rows[start:stop], weight[expert], out=out[start:stop])
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> Tuple[Tensor, Tensor, Tensor, None]:
        rows, weight = ctx.saved_tensors
        needs_rows, needs_weight = ctx.needs_input_grad[:2]
        grad = grad.contiguous()
        grad_rows = torch.empty_like(rows) if needs_rows else None
        grad_weight = torch.empty_like(weight) if needs_weight else None
        grad_bias = weight.new_empty(weight.size(0), weight.size(2)) if needs_weight else None
        if needs_weight:
            idle = [expert for expert, count in enumerate(ctx.counts) if count == 0]
            grad_bias[idle] = 0
            for expert in idle:
                grad_weight[expert].zero_()
        for expert, start, stop in _groups(ctx.counts):
            if needs_rows:
                torch.mm(grad[start:stop], weight[expert].t(), out=grad_rows[start:stop])
            if needs_weight:
                torch.mm(rows[start:stop].t(), grad[start:stop], out=grad_weight[expert])
                torch.sum(grad[start:stop], 0, out=grad_bias[expert])
        return grad_rows, grad_weight, grad_bias, None


def _groups(counts: Sequence[int]) -> List[Tuple[int, int, int]]:
    """(expert, start, stop) for each expert that has rows."""
    groups, start = [], 0
    for expert, count in enumerate(counts):
        if count:
            groups.append((expert, start, start + count))
        start += count
    return groups


def grouped_linear(rows: Tensor, weight: Tensor, bias: Tensor, counts: Sequence[int]) -> Tensor:
    """Expert e's affine map on its rows: rows [N, I], weight [E, I, O], bias [E, O], counts [E] summing to N -> [N, O].

    Follows autocast as torch.nn.functional.linear does.
    """
    device = rows.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        rows, weight, bias = rows.to(dtype), weight.to(dtype), bias.to(dtype)
    return _GroupedLinear.apply(rows, weight, bias, counts)


class Experts(nn.Module):
    """E feed-forward networks M -> H -> M.

    Args: activation is a name of ACTIVATIONS or GATED_ACTIVATIONS (the hidden layer is then the product of an activated
    and a linear projection, arXiv 2002.05202), or any function of a tensor; dropout acts on the hidden layer.
    Raises ValueError for an unknown activation.
    """

    def __init__(
        self,
        num_experts: int,
        model_dim: int,
        hidden_dim: int,
        activation: Union[str, Callable[[Tensor], Tensor]] = "relu",
        dropout: float = 0.0,
    ):
        super().__init__()
        self.num_experts = num_experts
        self.first_expert = 0
        self.gated = activation in GATED_ACTIVATIONS
        self.activation = resolve_activation(activation)
        self.dropout = dropout
        inner = 2 * hidden_dim if self.gated else hidden_dim
        self.weight_in = nn.Parameter(torch.empty(num_experts, model_dim, inner))  # [E, M, H]
        self.bias_in = nn.Parameter(torch.empty(num_experts, inner))
        self.weight_out = nn.Parameter(torch.empty(num_experts, hidden_dim, model_dim))  # [E, H, M]
        self.bias_out = nn.Parameter(torch.empty(num_experts, model_dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Each expert starts as two torch.nn.Linear do: uniform within 1 / sqrt(fan in)."""
        for weight, bias in ((self.weight_in, self.bias_in), (self.weight_out, self.bias_out)):
            bound = 1 / math.sqrt(weight.size(1))
            nn.init.uniform_(weight, -bound, bound)
            nn.init.uniform_(bias, -bound, bound)

    def forward(self, rows: Tensor, counts: Sequence[int]) -> Tensor:
        """rows [N, M] grouped by expert, counts [E] summing to N -> [N, M]."""
        hidden = grouped_linear(rows, self.weight_in, self.bias_in, counts)  # [N, H], or [N, 2H] when gated
        if self.gated:
            gate, linear = hidden.chunk(2, dim=-1)
            hidden = self.activation(gate) * linear
        else:
            hidden = self.activation(hidden)
        hidden = F.dropout(hidden, self.dropout, self.training)
        return grouped_linear(hidden, self.weight_out, self.bias_out, counts)

    def keep(self, first: int, count: int) -> None:
        """Keep `count` experts from `first` on; the others live on other ranks. Full checkpoints load into the share kept."""
        self.first_expert = first
        for name, parameter in list(self.named_parameters()):
            setattr(self, name, nn.Parameter(parameter.detach().narrow(0, first, count).clone()))

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs) -> None:
        for name, parameter in self.named_parameters():
            whole = state_dict.get(prefix + name)
            if whole is not None and whole.size(0) == self.num_experts:
                state_dict[prefix + name] = whole.narrow(0, self.first_expert, parameter.size(0))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def extra_repr(self) -> str:
        experts, model_dim, _ = self.weight_in.shape  # experts: those kept here
        return f"num_experts={experts}, model_dim={model_dim}, hidden_dim={self.weight_out.size(1)}, gated={self.gated}"


def resolve_activation(activation: Union[str, Callable[[Tensor], Tensor]]) -> Callable[[Tensor], Tensor]:
    """The function behind a name. Raises ValueError, listing the known names, for an unknown one."""
    if callable(activation):
        return activation
    known = {**ACTIVATIONS, **GATED_ACTIVATIONS}
    if activation not in known:
        raise ValueError(f"--expert-activation {activation} is unknown; choose from {', '.join(known)}")
    return known[activation]
