"""The kernels as custom ops, so that fake tensors, torch.compile and the cost model see one op for each launch.

On a GPU, and where TRITON_INTERPRET=1 is set, an op runs its Triton kernel; elsewhere, the formula of reference.py. Ops are not
differentiable; functions.py is. Tensors are contiguous, apart from stacked matrices.
"""

import functools
import importlib
import os
from contextlib import nullcontext
from typing import Any, Callable, ContextManager, Optional, Tuple

import torch
from torch import Tensor

from fairseq_sparsemixer.moe.kernels import reference
from fairseq_sparsemixer.moe.kernels.sizes import (
    BIAS_TILE,
    COMBINE_TILE,
    num_blocks,
    num_parts,
    num_route_blocks,
    num_tiles,
)

NAMESPACE = "fairseq_sparsemixer"


def implementation(name: str, tensor: Tensor) -> Callable[..., Any]:
    """The function that computes the op of that name on the tensor's device."""
    if tensor.is_cuda or os.environ.get("TRITON_INTERPRET") == "1":
        run: Callable[..., Any] = importlib.import_module(f"{__package__}.{name}").run
        return run
    of_reference: Callable[..., Any] = getattr(reference, name)
    return of_reference


def on_device_of(tensor: Tensor) -> ContextManager[Any]:
    """A context in which the tensor's GPU is the thread's current device, where Triton launches; a new thread's is GPU 0."""
    if not tensor.is_cuda or tensor.get_device() == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(tensor.device)


def _op(fake: Callable[..., Any], *mutated: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Make a signature a custom op whose results on fake tensors are those of `fake`."""

    def register(signature: Callable[..., Any]) -> Callable[..., Any]:
        name = signature.__name__

        @functools.wraps(signature)
        def run(*arguments: Any) -> Any:
            tensor: Tensor = next(filter(torch.is_tensor, arguments))
            with on_device_of(tensor):
                return implementation(name, tensor)(*arguments)

        op = torch.library.custom_op(f"{NAMESPACE}::{name}", run, mutates_args=mutated)
        op.register_fake(fake)
        return op

    return register


@_op(lambda expert_index, unrouted, num_experts: expert_index.new_empty(
    num_blocks(expert_index.numel()), num_experts + 1, dtype=torch.int32))  # fmt: skip
def count_pairs(expert_index: Tensor, unrouted: Optional[Tensor], num_experts: int) -> Tensor:
    """expert_index [S, k] int64, unrouted [S, k] bool -> [B, E + 1] int32: the pairs of each block of BLOCK, by expert.

    The last column counts unrouted pairs.
    """


@_op(lambda expert_index, unrouted, counts: (
    expert_index.new_empty(expert_index.numel()), counts.new_empty(expert_index.numel()), counts.new_empty(counts.size(1) - 1)
))  # fmt: skip
def place_pairs(expert_index: Tensor, unrouted: Optional[Tensor], counts: Tensor) -> Tuple[Tensor, Tensor, Tensor]:
    """The stable order of the pairs by expert, given count_pairs: pairs [P] int64, place [P] int32, ends [E] int32.

    Pair pairs[n] is in row n, unrouted ones last; place is the inverse.
    """


@_op(lambda tokens, pairs, ends, k, dtype: tokens.new_empty(pairs.size(0), tokens.size(1), dtype=dtype))
def gather_rows(tokens: Tensor, pairs: Tensor, ends: Optional[Tensor], k: int, dtype: torch.dtype) -> Tensor:
    """tokens [S, M], pairs [N] int64 -> [N, M] of that dtype: row n is token pairs[n] // k, or zero from ends[-1] on."""


@_op(lambda rows, place, ends, k, weight, bias, expert_index, scale, dtype: rows.new_empty(
    place.size(0) // k, rows.size(1), dtype=dtype))  # fmt: skip
def combine_rows(
    rows: Tensor,
    place: Tensor,
    ends: Optional[Tensor],
    k: int,
    weight: Optional[Tensor],
    bias: Optional[Tensor],
    expert_index: Optional[Tensor],
    scale: Optional[Tensor],
    dtype: torch.dtype,
) -> Tensor:
    """rows [N, M], place [P] -> [S, M]: each token's sum over its pairs p of weight[p] * (row + bias[expert_index[p]]) * scale.

    The row is place[p]; pairs whose row is not below N and ends[-1] add nothing. weight [S, k], bias [E, M] with expert_index
    [S, k], and scale [M] may be missing. Summed in float32, in the order of the choices.
    """


def _combine_backward(grad, rows, pairs, ends, k, weight, bias, scale):  # as the op below
    tiles = num_tiles(pairs.size(0), ends.size(0), COMBINE_TILE)
    sums = [rows.new_empty(0 if tensor is None else tiles, rows.size(1), dtype=torch.float32) for tensor in (bias, scale)]
    return (torch.empty_like(rows), weight.new_empty(pairs.size(0), dtype=torch.float32), *sums)


@_op(_combine_backward)
def combine_backward(
    grad: Tensor,
    rows: Tensor,
    pairs: Tensor,
    ends: Tensor,
    k: int,
    weight: Tensor,
    bias: Optional[Tensor],
    scale: Optional[Tensor],
) -> Tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of combine_rows, given grad [S, M]: rows [N, M], weight [P] in float32, and sums of tiles for bias and scale.

    Those sums [T, M], of COMBINE_TILE rows each, are empty without a bias or scale; add them with sum_tiles, or over all T.
    """


@_op(lambda product, bias, ends, activation, keep, factor: product.new_empty(
    product.size(0), product.size(1) // (2 if activation in reference.GATED else 1)))  # fmt: skip
def bias_activation(
    product: Tensor, bias: Tensor, ends: Tensor, activation: str, keep: Optional[Tensor], factor: float
) -> Tensor:
    """product [N, I], bias [E, I] -> [N, H]: activation(product + bias of the row's expert), zero behind the last expert.

    activation: identity, relu, gelu, silu, geglu or swiglu. keep [N, H] bool, if given: zero where False, times factor elsewhere.
    """


def _bias_activation_backward(grad, kept, bias, ends, activation, keep, factor):  # as the op below
    hidden = grad.new_empty(0 if activation == "relu" else grad.size(0), grad.size(1))
    tiles = num_tiles(grad.size(0), ends.size(0), BIAS_TILE)
    return torch.empty_like(kept), hidden, grad.new_empty(tiles, kept.size(1), dtype=torch.float32)


@_op(_bias_activation_backward)
def bias_activation_backward(
    grad: Tensor, kept: Tensor, bias: Tensor, ends: Tensor, activation: str, keep: Optional[Tensor], factor: float
) -> Tuple[Tensor, Tensor, Tensor]:
    """Given grad [N, H] of the hidden layer: that of the product [N, I], the hidden layer, and sums of tiles for the bias [T, I].

    kept: for relu, the hidden layer, which is then not returned; for others the product, from which it is computed again. keep is
    not needed for relu: its result is zero where a unit was dropped. A tile has BIAS_TILE rows; add the sums with sum_tiles.
    """


@_op(lambda rows, ends: rows.new_empty(num_tiles(rows.size(0), ends.size(0), BIAS_TILE), rows.size(1), dtype=torch.float32))
def tile_sums(rows: Tensor, ends: Tensor) -> Tensor:
    """rows [N, M] -> [T, M]: the sum of each tile of BIAS_TILE rows, for sum_tiles."""


@_op(lambda sums, ends, rows, tile, dtype: sums.new_empty(ends.size(0), sums.size(1), dtype=dtype))
def sum_tiles(sums: Tensor, ends: Tensor, rows: int, tile: int, dtype: torch.dtype) -> Tensor:
    """sums [T, C] of tiles of N rows -> [E, C]: each expert's sum, in the order of its tiles; zero for an expert without rows."""


@_op(lambda parts, dtype: parts.new_empty(parts.shape[1:], dtype=dtype))
def sum_parts(parts: Tensor, dtype: torch.dtype) -> Tensor:
    """parts [T, ...] float32 -> their sum [...], in their order, of that dtype."""


@_op(lambda rows, ends: None, "rows")
def clear_tail(rows: Tensor, ends: Tensor) -> None:
    """Set rows [N, M] to zero from ends[-1] on."""


@_op(lambda stacked, ends: None, "stacked")
def clear_idle(stacked: Tensor, ends: Tensor) -> None:
    """Set the matrices of experts without rows to zero; stacked [E, A, B]."""


@_op(lambda rows, matrices, ends: rows.new_empty(rows.size(0), matrices.size(2)))
def grouped_product(rows: Tensor, matrices: Tensor, ends: Tensor) -> Tensor:
    """rows [N, A], matrices [E, A, B] in any layout -> [N, B]: each expert's rows times its matrix, zero from ends[-1] on."""


@_op(lambda inputs, grad, ends: inputs.new_empty(ends.size(0), inputs.size(1), grad.size(1)))
def grouped_weight_gradient(inputs: Tensor, grad: Tensor, ends: Tensor) -> Tensor:
    """inputs [N, A], grad [N, B] -> [E, A, B]: each expert's inputs transposed, times the gradients of its outputs."""


@_op(lambda tokens, weight: tokens.new_empty(tokens.size(0), weight.size(0), dtype=torch.float32))
def project(tokens: Tensor, weight: Tensor) -> Tensor:
    """tokens [S, M], weight [E, M] -> logits [S, E], computed in float32."""


@_op(lambda grad, weight, others, dtype: grad.new_empty(grad.size(0), weight.size(1), dtype=dtype))
def project_backward_tokens(grad: Tensor, weight: Tensor, others: Optional[Tensor], dtype: torch.dtype) -> Tensor:
    """grad [S, E] of the logits, weight [E, M] -> the gradient of the tokens [S, M], of that dtype.

    others [S, M], if given: the gradient by the tokens' other uses, which is added.
    """


@_op(lambda grad, tokens: grad.new_empty(num_parts(grad.size(0), grad.size(1), tokens.size(1)), grad.size(1), tokens.size(1)))
def project_backward_weight(grad: Tensor, tokens: Tensor) -> Tensor:
    """grad [S, E] of the logits, tokens [S, M] -> [parts, E, M]; sum_parts gives the gradient of the weight."""


def _route(logits, noise, bias, padding_mask, router, k, *options):  # as the op below
    tokens, experts = logits.shape
    index, sums = logits.new_empty(tokens, k, dtype=torch.int64), logits.new_empty(num_route_blocks(tokens), 2 * experts + 2)
    return index, logits.new_empty(tokens, k), torch.empty_like(logits), sums


@_op(_route)
def route(
    logits: Tensor,
    noise: Optional[Tensor],
    bias: Optional[Tensor],
    padding_mask: Optional[Tensor],
    router: str,
    k: int,
    jitter_eps: float,
    node: int,
    node_at_argmax: bool,
    sampled: bool,
) -> Tuple[Tensor, Tensor, Tensor, Tensor]:
    """logits [S, E] float32 -> expert_index [S, k], combine weights [S, k], probabilities [S, E], and sums for route_losses.

    router: switch, sparsemixer or sparsemixer_v2, as the pure functions in gates/. noise: None at inference; the jitter [S, E]
    of switch; for the others uniform numbers [S, k, E + 1], the last of which is the coin. bias [E]: added for the choice only.
    node: the estimator's in estimators.NODES; -1: always 1. Without node_at_argmax it is 1 for the arg-max expert. sampled: with
    Gumbel noise. The sums [B, 2 E + 2] are over blocks of tokens, without padding: probabilities, choices, squares of
    log-sum-exp, tokens.
    """


@_op(lambda sums, k: (sums.new_empty(()), sums.new_empty(()), sums.new_empty(sums.size(1) // 2)))
def route_losses(sums: Tensor, k: int) -> Tuple[Tensor, Tensor, Tensor]:
    """The sums of route -> the balance loss and the router z-loss, scalars; and slopes [E + 1] for route_backward.

    Slopes: of the balance loss by the sum of probabilities of each expert, and of the z-loss by the sum of squares.
    """


@_op(lambda grad_weight, grad_balance, grad_router_z, logits, *rest: torch.empty_like(logits))
def route_backward(
    grad_weight: Optional[Tensor],
    grad_balance: Optional[Tensor],
    grad_router_z: Optional[Tensor],
    logits: Tensor,
    noise: Optional[Tensor],
    padding_mask: Optional[Tensor],
    index: Tensor,
    slopes: Tensor,
    router: str,
    jitter_eps: float,
    gain: float,
) -> Tensor:
    """The gradient of the logits [S, E], from those of the combine weights [S, k] and of the two losses, if any.

    gain: the estimator's, 1 at inference.
    """
