"""Compatibility of fairseq with later versions of numpy."""

import torch
from fairseq.data import TokenBlockDataset

import fairseq_sparsemixer  # noqa: F401


def test_text_is_split_at_line_ends():
    """fairseq uses a name that numpy 2 removed."""
    lines = [torch.tensor([5, 6, 2]), torch.tensor([7, 2])]
    blocks = TokenBlockDataset(lines, [3, 2], block_size=None, pad=1, eos=2, break_mode="eos")
    assert [block.tolist() for block in blocks] == [[5, 6, 2], [7, 2]]
