"""Transposing blocks of rows, compared with a stable sort by block."""

import pytest
import torch

from fairseq_sparsemixer.moe.dispatch.blocks import transpose_blocks, transposed

SIZES = [[[3]], [[2, 0, 5]], [[1], [4]], [[0, 2], [3, 1], [2, 0]], [[0, 0], [0, 0]]]


@pytest.mark.parametrize("sizes", SIZES)
def test_blocks_come_in_the_transposed_order_and_their_rows_in_the_old_one(sizes):
    keys = [(column, line) for line, row in enumerate(sizes) for column, size in enumerate(row) for _ in range(size)]
    rows = torch.randn(len(keys), 3, dtype=torch.float64, requires_grad=True)
    order = sorted(range(len(keys)), key=keys.__getitem__)  # stable
    moved = transpose_blocks(rows, sizes)
    assert torch.equal(moved, rows[order])
    assert torch.equal(transpose_blocks(moved, transposed(sizes)), rows)
    assert torch.autograd.gradcheck(lambda rows: transpose_blocks(rows, sizes), (rows,))


@pytest.mark.parametrize("sizes", SIZES[:3])
def test_rows_of_one_rank_or_of_one_expert_are_not_copied(sizes):
    rows = torch.randn(sum(map(sum, sizes)), 3)
    assert transpose_blocks(rows, sizes) is rows
