"""The bytes and FLOPs of single ops, by hand."""

import pytest
import torch

from benchmarks.fake_cuda.traffic import kernel, size

aten = torch.ops.aten
HALF, LONG = 2, 8  # bytes of a bfloat16 and of an index


def cost(op, *args, **kwargs):
    out = op(*args, **kwargs)
    return kernel(op, args, kwargs, [out])


def half(*shape):
    return torch.zeros(*shape, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    "op, args, expected",
    [
        (aten.add.Tensor, (half(4, 6), half(6)), HALF * (24 + 6 + 24)),
        (aten.add_.Tensor, (half(4, 6), half(4, 6)), HALF * 3 * 24),
        (aten.zeros_like.default, (half(4, 6),), HALF * 24),
        (aten.copy_.default, (torch.zeros(4, 6), half(4, 6)), HALF * 24 + 4 * 24),
        (aten.index_select.default, (half(100, 6), 0, torch.tensor([3, 5])), LONG * 2 + HALF * (12 + 12)),
        (aten.index_select.default, (half(2, 6), 0, torch.tensor([0, 1, 1, 1])), LONG * 4 + HALF * (12 + 24)),
        (aten.index_copy_.default, (half(100, 6), 0, torch.tensor([3, 5]), half(2, 6)), LONG * 2 + HALF * (12 + 12)),
        (aten.index_add_.default, (half(100, 6), 0, torch.tensor([3, 5]), half(2, 6)), LONG * 2 + HALF * (12 + 24)),
        (aten.cat.default, ([half(2, 6), half(3, 6)],), HALF * 2 * 30),
    ],
    ids=lambda value: str(value) if callable(value) else "",
)
def test_an_op_reads_what_it_needs_once_and_writes_its_result(op, args, expected):
    assert cost(op, *args).bytes == expected and cost(op, *args).flops == 0


def test_an_expanded_dimension_is_read_once():
    assert size(half(4, 1).expand(4, 100)) == HALF * 4
    assert size(half(0, 3)) == 0


def test_results_given_as_arguments_are_not_read():
    found = cost(aten.mm.out, half(4, 5), half(5, 6), out=half(4, 6))
    assert found == ("mm", HALF * (20 + 30 + 24), 2 * 4 * 5 * 6, False)


def test_products_cost_two_flops_per_multiplication():
    assert cost(aten.addmm.default, half(6), half(4, 5), half(5, 6)).flops == 240
    assert cost(aten.bmm.default, half(3, 4, 5), half(3, 5, 6)).flops == 720
    assert cost(aten.mv.default, torch.zeros(4, 5), torch.zeros(5)) == ("mv", 4 * (20 + 5 + 4), 40, True)
