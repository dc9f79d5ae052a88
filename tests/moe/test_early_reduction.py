"""Expert gradients reduced during the backward pass: the same sums, started in one order, as soon as they can be."""

import pytest
import torch
from ranks import run_ranks
from torch import distributed as dist
from torch import nn

from fairseq_sparsemixer.moe.early_reduction import EarlyReduction
from fairseq_sparsemixer.moe.gradients import reduce_expert_gradients
from fairseq_sparsemixer.moe.parallel import form_expert_group

pytestmark = pytest.mark.distributed

SIZES = (2, 3, 4)  # of the three parameters


class Chain(nn.Module):
    """Three parameters used one after the other; `skipped` is left out."""

    def __init__(self, events):
        super().__init__()
        self.events = events
        self.weights = nn.ParameterList(nn.Parameter(torch.ones(size)) for size in SIZES)
        for parameter in self.weights:
            parameter.expert = True

    def forward(self, x, skipped=None):
        for place, weight in enumerate(self.weights):
            if place != skipped:
                x = Scale.apply(x, weight, place, self.events)
        return x


class Scale(torch.autograd.Function):
    """x times the sum of a weight; backward records its place."""

    @staticmethod
    def forward(ctx, x, weight, place, events):
        ctx.save_for_backward(x, weight)
        ctx.place, ctx.events = place, events
        return x * weight.sum()

    @staticmethod
    def backward(ctx, grad):
        ctx.events.append(f"backward {ctx.place}")
        x, weight = ctx.saved_tensors
        return grad * weight.sum(), (grad * x).sum().expand_as(weight).clone(), None, None


def update(early, skipped):
    """Two micro-batches on two replicas; rank 1 leaves a parameter out of the last. Events and reduced gradients."""
    events, group = [], form_expert_group(1)
    model = Chain(events)
    reduce = dist.all_reduce

    def recording(tensor, *arguments, **options):
        events.append(f"reduce {SIZES.index(len(tensor))}")
        return reduce(tensor, *arguments, **options)

    dist.all_reduce = recording
    reduction = EarlyReduction(model, group) if early else None
    for last in (False, True):
        if early:
            reduction.expect(last)
        x = torch.tensor([1.0 + dist.get_rank() + 2 * last], requires_grad=True)
        model(x, skipped if last and dist.get_rank() else None).sum().backward()
    events.append("end of backward")
    reduction.finish() if early else reduce_expert_gradients(model, group)
    dist.all_reduce = reduce
    return events, [weight.grad.tolist() for weight in model.weights]


FIRST = ["backward 2", "backward 1", "backward 0"]


@pytest.mark.parametrize("skipped", [None, 0, 1, 2])
def test_gradients_are_reduced_during_backward_in_one_order_on_all_ranks(skipped):
    results = run_ranks(2, update, True, skipped)
    whole, other = (events for events, _ in results)
    assert whole == FIRST + [
        "backward 2", "reduce 2", "backward 1", "reduce 1", "backward 0", "reduce 0", "end of backward",
    ]  # fmt: skip
    assert [event for event in other if "reduce" in event] == ["reduce 2", "reduce 1", "reduce 0"]
    assert other[-1] == "end of backward"
    if skipped == 1:
        assert other == FIRST + ["backward 2", "reduce 2", "backward 0", "reduce 1", "reduce 0", "end of backward"]


@pytest.mark.parametrize("skipped", [None, 1])
def test_the_sums_equal_those_after_backward_bit_for_bit(skipped):
    early, late = run_ranks(2, update, True, skipped), run_ranks(2, update, False, skipped)
    assert [gradients for _, gradients in early] == [gradients for _, gradients in late]
    assert early[0][1] == early[1][1]


def nothing_computed():
    """A rank without any gradient joins the sums of the others when it finishes; a second finish adds nothing."""
    model, group = Chain([]), form_expert_group(1)
    reduction = EarlyReduction(model, group)
    reduction.expect(last=True)
    if dist.get_rank() == 0:
        model(torch.ones(1, requires_grad=True)).sum().backward()
    reduction.finish()
    reduction.finish()
    return [weight.grad.tolist() for weight in model.weights]


def test_a_rank_without_gradients_joins_with_zeros():
    product = SIZES[0] * SIZES[1] * SIZES[2]
    expected = [[product / size / 2] * size for size in SIZES]  # one of two ranks has the gradient, divided by two ranks
    assert run_ranks(2, nothing_computed) == [expected, expected]


def backward_twice():
    model, group = Chain([]), form_expert_group(1)
    EarlyReduction(model, group).expect(last=True)
    for _ in range(2):
        model(torch.ones(1, requires_grad=True)).sum().backward()


def test_a_gradient_that_changes_after_its_reduction_is_an_error():
    with pytest.raises(AssertionError, match="changed after its reduction, as backward ran twice on a micro-batch"):
        run_ranks(2, backward_twice)
