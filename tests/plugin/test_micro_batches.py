"""A rank whose last micro-batches are empty adds the sums of the others."""

import pytest
import torch

from fairseq_sparsemixer.plugin.micro_batches import Sums, of_own_batches

BATCH = {"id": 1}


def outputs(*sizes):
    return [{"loss": 10.0 * size, "sample_size": size} for size in sizes]


@pytest.mark.parametrize("empty", [{}, [], None])
@pytest.mark.parametrize("nothing", [0.0, torch.tensor(0.0)])
def test_what_fairseq_ignored_counts_but_for_empty_batches(empty, nothing):
    found = of_own_batches([BATCH, BATCH, empty], Sums(outputs(3, 4, 5), nothing, True))
    assert found == Sums(outputs(3, 4), torch.tensor(7.0) if torch.is_tensor(nothing) else 7.0, False)
    assert type(found.sample_size) is type(nothing)


@pytest.mark.parametrize(
    "samples, sums",
    [
        ([BATCH, BATCH], Sums(outputs(3, 4), 7.0, False)),
        ([{}, {}], Sums(outputs(3, 4), 0.0, True)),
        ([BATCH, {}], Sums(outputs(3), 0.0, True)),  # one did not fit into memory
        ([BATCH, {}], Sums([{"loss": 1.0}] * 2, 0.0, True)),
    ],
    ids=["all have batches", "none has a batch", "lost batch", "no sample size"],
)
def test_all_else_stays_as_fairseq_made_it(samples, sums):
    assert of_own_batches(samples, sums) is sums
