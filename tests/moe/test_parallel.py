"""Expert groups: sizes, copies, timing of collectives."""

import copy
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fairseq_sparsemixer.moe.gates import build_gate
from fairseq_sparsemixer.moe.gates.balance_scope import RanksScope, Update
from fairseq_sparsemixer.moe.parallel import CollectiveTimer, ExpertGroup, RankGroup, expert_parallel_size


@given(st.integers(1, 64), st.integers(1, 64))
def test_the_default_size_is_the_greatest_common_divisor_of_ranks_and_experts(world_size, num_experts):
    size = expert_parallel_size(None, world_size, num_experts)
    assert size == max(n for n in range(1, 65) if world_size % n == 0 and num_experts % n == 0)


@given(st.integers(1, 16), st.integers(1, 16), st.integers(1, 16))
def test_a_requested_size_must_divide_ranks_and_experts(requested, world_size, num_experts):
    if world_size % requested == 0 and num_experts % requested == 0:
        assert expert_parallel_size(requested, world_size, num_experts) == requested
    else:
        with pytest.raises(ValueError, match=f"expert_parallel_size={requested}"):
            expert_parallel_size(requested, world_size, num_experts)


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        ((3, 6, 4), "num_experts=4 cannot be split over expert_parallel_size=3; with 6 ranks, use one of 1, 2"),
        ((3, 8, 4), "num_experts=4 cannot be split over expert_parallel_size=3; with 8 ranks, use one of 1, 2, 4"),
        ((4, 6, 8), "expert_parallel_size=4 does not divide the 6 ranks; use a divisor of 2"),
        ((0, 2, 4), "expert_parallel_size=0 must be at least 1"),
    ],
)
def test_an_invalid_size_is_refused_with_the_remedy(arguments, sentence):
    with pytest.raises(ValueError) as error:
        expert_parallel_size(*arguments)
    assert str(error.value) == sentence


def test_a_copied_model_keeps_its_expert_group():
    ranks = ExpertGroup(size=2, index=1, group=object(), replicas=object(), world_size=4, first_group=False)
    assert copy.deepcopy(ranks) is ranks
    assert ranks.num_replicas == 2


@pytest.mark.parametrize("scope", [RanksScope, lambda group: Update(RankGroup(group)).scope()], ids=["global", "update"])
def test_a_copied_gate_keeps_its_balance_scope(scope):
    gate, group = build_gate("switch", 4, 2), Uncopyable()
    gate.balance_scope = scope(group)
    copied = copy.deepcopy(gate).balance_scope
    assert (copied.group if isinstance(copied, RanksScope) else copied.update.group).handle is group


class Uncopyable:
    """Cannot be copied, like torch's process groups."""

    def __deepcopy__(self, memo):
        raise TypeError("cannot pickle ProcessGroup")


def test_reading_the_timer_resets_it():
    import torch

    timer = CollectiveTimer()
    with timer.measure(torch.device("cpu")):
        pass
    assert timer.read().cpu > 0
    assert timer.read() == (0.0, 0)


def test_the_time_of_collectives_is_in_milliseconds(monkeypatch):
    ticks = iter([1.0, 1.25])
    monkeypatch.setattr(time, "perf_counter", lambda: next(ticks))
    timer = CollectiveTimer()
    with timer.measure(torch.device("cpu")):
        pass
    assert timer.read().cpu == pytest.approx(250)


class Event:
    """A CUDA event of a device whose clock the test sets, in milliseconds. It has no time until the host waits for it."""

    clock, reached = 0.0, 0.0

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.at = Event.clock

    def synchronize(self):
        Event.reached = max(Event.reached, self.at)

    def elapsed_time(self, stop):
        assert max(self.at, stop.at) <= Event.reached, "this event is still under way"
        return stop.at - self.at


def test_on_a_gpu_the_times_of_all_collectives_are_added_after_the_last_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Event", Event)
    timer = CollectiveTimer()
    for start, stop in ((1.0, 4.0), (10.0, 15.0)):
        Event.clock = start
        with timer.measure(torch.device("cuda")):
            Event.clock = stop
    assert timer.read().cuda == (4 - 1) + (15 - 10)
    assert timer.read().cuda == 0
