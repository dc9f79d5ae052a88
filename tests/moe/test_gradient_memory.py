"""Expert gradients reuse their memory, but never that of a tensor still in use."""

import copy
import pickle

import pytest
import torch

from fairseq_sparsemixer.moe import gradient_memory
from fairseq_sparsemixer.moe.experts import Experts
from fairseq_sparsemixer.moe.gradient_memory import GradBufferPool


@pytest.fixture(autouse=True)
def every_size_is_kept(monkeypatch):
    monkeypatch.setattr(gradient_memory, "WORTH_KEEPING", 0)


def test_memory_is_reused_only_if_no_tensor_uses_it():
    memory, parameter = GradBufferPool(), torch.zeros(3, 4)
    first = memory.like("in", parameter)
    address = first.data_ptr()
    part = first[1]
    del first
    second = memory.like("in", parameter)
    assert second.data_ptr() != part.data_ptr() and second.shape == (3, 4) and second.dtype == parameter.dtype
    address = second.data_ptr()
    del second, part
    assert memory.like("in", parameter).data_ptr() == address
    assert memory.like("in", torch.zeros(5, 4)).shape == (5, 4)


def test_a_gradient_kept_by_the_caller_survives_the_next_backward():
    experts = Experts(2, 3, 4)
    rows = torch.randn(4, 3)
    experts(rows, [4, 0]).sum().backward()
    kept = experts.weight_in.grad
    expected = kept.clone()
    experts.zero_grad(set_to_none=True)
    experts(rows * 2, [1, 3]).sum().backward()
    assert torch.equal(kept, expected) and not torch.equal(experts.weight_in.grad, expected)


def test_gradients_accumulate_and_reused_memory_is_cleared():
    experts = Experts(3, 3, 4).double()
    rows = torch.randn(4, 3, dtype=torch.float64)
    experts(rows, [2, 0, 2]).sum().backward()
    once = [parameter.grad.clone() for parameter in experts.parameters()]
    experts(rows, [2, 0, 2]).sum().backward()
    for parameter, grad in zip(experts.parameters(), once):
        torch.testing.assert_close(parameter.grad, 2 * grad)
    experts.zero_grad(set_to_none=True)
    experts(rows, [0, 4, 0]).sum().backward()
    assert experts.weight_in.grad[1].any() and not experts.weight_in.grad[[0, 2]].any()


def test_copies_and_pickles_do_not_share_memory():
    experts = Experts(2, 3, 4)
    experts(torch.randn(4, 3), [2, 2]).sum().backward()
    for twin in (copy.deepcopy(experts), pickle.loads(pickle.dumps(experts))):
        assert twin.gradient_memory is not experts.gradient_memory
        twin(torch.randn(4, 3), [2, 2]).sum().backward()


def test_only_large_gradients_on_the_cpu_get_blocks_of_their_own(monkeypatch):
    sizes = []

    def block(handle, size, **options):
        sizes.append(size)
        return bytearray(size)

    monkeypatch.setattr(gradient_memory, "WORTH_KEEPING", 48)
    monkeypatch.setattr(gradient_memory.mmap, "mmap", block)
    memory = GradBufferPool()
    for parameter in (torch.zeros(11), torch.zeros(12, dtype=torch.bfloat16), torch.zeros(100, device="meta")):
        like = memory.like("in", parameter)
        assert (like.shape, like.dtype, like.device) == (parameter.shape, parameter.dtype, parameter.device)
    assert sizes == []
    assert memory.like("in", torch.zeros(3, 4)).shape == (3, 4)
    assert sizes == [48]


@pytest.mark.parametrize("chunks, backwards, blocks", [(1, 1, 1), (2, 1, 2), (5, 1, 2), (1, 3, 2), (2, 3, 3), (5, 3, 3)])
def test_memory_does_not_grow_with_chunks_and_micro_batches_and_is_not_taken_anew(chunks, backwards, blocks, monkeypatch):
    """All blocks are mapped in the first step, and gradients are added up in them."""
    made, new = [], gradient_memory.mmap.mmap
    monkeypatch.setattr(gradient_memory.mmap, "mmap", lambda *size, **options: made.append(size) or new(*size, **options))
    experts = Experts(2, 3, 4)
    rows = torch.randn(4 * chunks, 3)
    for _ in range(3):
        experts.zero_grad(set_to_none=True)
        for _ in range(backwards):
            torch.cat([experts(chunk, [1, 3]) for chunk in rows.split(4)]).sum().backward()
        addresses = [torch.frombuffer(block, dtype=torch.float32).data_ptr() for kept in experts.gradient_memory._blocks.values()
                     for block in kept]  # fmt: skip
        assert {experts.weight_in.grad.data_ptr(), experts.weight_out.grad.data_ptr()} <= set(addresses)
    assert len(made) == 2 * blocks  # of weight_in and weight_out
