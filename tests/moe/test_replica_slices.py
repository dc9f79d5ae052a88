"""moe/replica_slices.py: slices of parameters that replicas update, compared with whole updates in one process."""

import math
from functools import partial
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import run_ranks
from torch import distributed as dist
from torch import nn

from fairseq_sparsemixer.moe.parallel import form_expert_group
from fairseq_sparsemixer.moe.replica_slices import ReplicaSlices

SHAPES = [(2, 3, 4), (5,), (1,), (3, 7)]  # with three replicas: even slices, uneven ones, empty ones
OPTIMIZERS = {
    "adam": partial(torch.optim.Adam, lr=0.1, weight_decay=0.1),
    "sgd": partial(torch.optim.SGD, lr=0.1, momentum=0.9),
    "adagrad": partial(torch.optim.Adagrad, lr=0.1),  # makes its state when it is built
}


def slices_of(index: int, count: int, parameters=()) -> ReplicaSlices:
    """Those of replica `index` of `count`, without ranks."""
    with patch.object(dist, "get_rank", lambda group: index):
        return ReplicaSlices(parameters, SimpleNamespace(replicas=None, num_replicas=count))


@given(shape=st.lists(st.integers(1, 6), min_size=1, max_size=3), count=st.integers(1, 9))
@settings(max_examples=50)
def test_slices_make_up_the_whole_in_order_and_differ_little_in_size(shape, count):
    whole = torch.arange(math.prod(shape)).view(shape)
    slices = [slices_of(index, count).own(whole) for index in range(count)]
    assert torch.equal(torch.cat(slices), whole.flatten())
    assert max(map(len, slices)) == math.ceil(whole.numel() / count)
    assert all(len(own) == 0 or own.data_ptr() >= whole.data_ptr() for own in slices)


def test_parameters_and_gradients_are_narrowed_in_place_and_come_back_after_an_error():
    parameter = nn.Parameter(torch.arange(6.0).view(2, 3))
    parameter.grad = torch.ones(3, 2).t()  # not contiguous
    frozen = nn.Parameter(torch.zeros(4))
    with pytest.raises(KeyError), slices_of(1, 2, [parameter, frozen]).narrowed():
        assert parameter.tolist() == [3, 4, 5] and parameter.grad.tolist() == [1, 1, 1]
        assert frozen.shape == (2,) and frozen.grad is None
        parameter.data.add_(10), parameter.grad.mul_(2)
        raise KeyError
    assert parameter.tolist() == [[0, 1, 2], [13, 14, 15]] and parameter.grad.tolist() == [[1, 1, 1], [2, 2, 2]]
    assert frozen.shape == (4,) and frozen.grad is None


def parameters_of(dtype):
    generator = torch.Generator().manual_seed(3)
    return [nn.Parameter(torch.rand(*shape, generator=generator).to(dtype)) for shape in SHAPES]


def gradients_of(update, dtype):
    generator = torch.Generator().manual_seed(100 + update)
    return [torch.rand(*shape, generator=generator).to(dtype) - 0.5 for shape in SHAPES]


def update_on_rank(name, dtype):
    """Three updates by slices: the parameters, the optimizer's state put together, and how many numbers of it a rank keeps."""
    parameters = parameters_of(dtype)
    slices = ReplicaSlices(parameters, form_expert_group(1))
    with slices.narrowed():
        optimizer = OPTIMIZERS[name](parameters)
    for update in range(3):
        for parameter, gradient in zip(parameters, gradients_of(update, dtype)):
            parameter.grad = gradient
        with slices.updating():
            optimizer.step()
    states = [{key: value for key, value in optimizer.state[p].items() if value.dim()} for p in parameters]
    kept = sum(value.numel() for state in states for value in state.values()) // len(states[0])
    joined = [{key: slices.whole(value, p.shape) for key, value in sorted(state.items())} for state, p in zip(states, parameters)]
    return [parameter.data for parameter in parameters], joined, kept


def update_all(dtype):
    return {name: update_on_rank(name, dtype) for name in OPTIMIZERS}


@pytest.mark.distributed
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_updates_by_slices_equal_whole_updates(dtype):
    ranks = run_ranks(3, update_all, dtype)
    for name, build in OPTIMIZERS.items():
        expected = parameters_of(dtype)
        optimizer = build(expected)
        for update in range(3):
            for parameter, gradient in zip(expected, gradients_of(update, dtype)):
                parameter.grad = gradient
            optimizer.step()
        for parameters, states, _ in (results[name] for results in ranks):
            for parameter, state, whole in zip(parameters, states, expected):
                assert torch.equal(parameter, whole.data)
                assert all(torch.equal(value, optimizer.state[whole][key]) for key, value in state.items()) and state
        assert [results[name][2] for results in ranks] == [8 + 2 + 1 + 7, 8 + 2 + 0 + 7, 8 + 1 + 0 + 7]
