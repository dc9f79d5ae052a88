"""Launches of millions of rows stay within what CUDA allows: 65,535 programs on every axis of a grid but the first."""

import importlib

import pytest
import torch

from fairseq_sparsemixer.moe.kernels import choice

pytestmark = pytest.mark.skipif(not choice.has_triton(), reason="Triton is not installed; pip install triton has it for Linux")
TOKENS, EXPERTS, WIDTH, K = 10_000_000, 256, 8, 2
FIRST, OTHERS = 2**31 - 1, 65_535


def some(*shape, dtype=torch.bfloat16):
    return torch.empty(*shape, dtype=dtype, device="meta")


def examples():
    """Each op whose launch grows with the rows, without the rows' values."""
    index, mask = some(TOKENS, K, dtype=torch.int64), some(TOKENS, K, dtype=torch.bool)
    pairs = some(TOKENS * K, dtype=torch.int64)
    place, ends = some(TOKENS * K, dtype=torch.int32), some(EXPERTS, dtype=torch.int32)
    tokens, rows, bias = some(TOKENS, WIDTH), some(TOKENS * K, WIDTH), some(EXPERTS, WIDTH)
    weight, logits = some(TOKENS, K, dtype=torch.float32), some(TOKENS, EXPERTS, dtype=torch.float32)
    yield "count_pairs", (index, mask, EXPERTS)
    yield "place_pairs", (index, mask, some(TOKENS * K // 1024 + 1, EXPERTS + 1, dtype=torch.int32))
    yield "gather_rows", (tokens, pairs, ends, K, torch.bfloat16)
    yield "combine_rows", (rows, place, ends, K, weight, bias, index, None, torch.bfloat16)
    yield "combine_backward", (tokens, rows, pairs, ends, K, weight, bias, None)
    yield "bias_activation", (rows, bias, ends, "gelu", None, 1.0)
    yield "bias_activation_backward", (rows, rows, bias, ends, "gelu", None, 1.0)
    yield "tile_sums", (rows, ends)
    yield "clear_tail", (rows, ends)
    yield "grouped_product", (rows, some(EXPERTS, WIDTH, WIDTH), ends)
    yield "grouped_weight_gradient", (rows, rows, ends)
    yield "project", (tokens, some(EXPERTS, WIDTH))
    yield "project_backward_tokens", (logits, some(EXPERTS, WIDTH), None, torch.bfloat16)
    yield "project_backward_weight", (logits, tokens)
    yield "route", (logits, None, None, None, "switch", 1, 0.0, -1, False, True)
    yield "route_backward", (weight, None, None, logits, None, None, index, logits[0], "switch", 0.0, 1.0)


def test_launches_of_millions_of_rows_are_allowed(monkeypatch):
    from triton.runtime.jit import JITFunction

    grids = []
    monkeypatch.setattr(JITFunction, "run", lambda self, *arguments, grid, **options: grids.append(grid))
    for name, arguments in examples():
        importlib.import_module(f"fairseq_sparsemixer.moe.kernels.{name}").run(*arguments)
        first, *others = grids[-1]
        assert 0 < first <= FIRST and all(0 < size <= OTHERS for size in others), f"{name}: {grids[-1]}"
