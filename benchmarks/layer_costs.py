"""Counts what layers cost on a GPU, on fake CUDA tensors: reads Cases as JSON from stdin, writes their Costs as JSON to stdout.

Runs in a process with the shim: `python -m benchmarks.fake_cuda SHIM benchmarks.layer_costs`; see benchmarks.roofline.
"""

import itertools
import json
import sys
from contextlib import ExitStack, contextmanager
from typing import Any, Dict, Iterator, List, Set
from unittest import mock

import torch
from torch import Tensor
from torch import distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.contenders import Contender, Shape, dense, ours
from benchmarks.costs import Case, Costs
from benchmarks.fake_cuda.traffic import size
from benchmarks.fake_cuda.watching import Watch
from fairseq_sparsemixer.moe.kernels import choice
from fairseq_sparsemixer.moe.layer import shard_experts
from fairseq_sparsemixer.moe.parallel import ExpertGroup

BALANCED = "the numbers read from the device no longer are those of an exchange plan; adapt benchmarks/layer_costs.py"


def count(case: Case) -> Costs:
    """Forward and backward of the case's layer in bfloat16, with the same number of tokens for every expert.

    Raises ValueError if tokens cannot be divided equally.
    """
    pairs = case.tokens * case.top_k
    if case.layer != "dense" and (pairs % case.experts or case.experts % case.group):
        raise ValueError(f"{pairs} token-expert pairs, {case.experts} experts and {case.group} ranks do not divide equally")
    with on_fake_gpu(case.capability), choice.forced(True):
        contender = build(case)
        x = torch.randn(case.tokens, case.model_dim, device="cuda", requires_grad=True)
        upstream = torch.randn_like(x)
        watch, saved = Watch(itertools.chain(numbers_read(case), itertools.repeat(0)).__next__), Saved(contender, x)
        with sent_bytes() as sent, watch, saved.hooks():
            contender.step(x, upstream)
    waits = len(list(itertools.groupby(watch.waits)))  # a list of numbers is read at once
    costs = Costs(list(watch.kernels.items()), waits, sent, saved.bytes)
    if costs.flops < 12 * pairs * case.model_dim * case.hidden_dim:
        raise RuntimeError(f"fewer than {pairs} rows were computed: {BALANCED}")
    return costs


@contextmanager
def on_fake_gpu(capability: int) -> Iterator[None]:
    """bfloat16 fake tensors, on a GPU of this major capability."""
    with FakeTensorMode(), mock.patch("torch.cuda.get_device_capability", lambda *_: (capability, 0)):
        torch.set_default_dtype(torch.bfloat16)  # fake parameters cannot be converted later
        try:
            yield
        finally:
            torch.set_default_dtype(torch.float32)


def build(case: Case) -> Contender:
    """The case's layer, sharded over its group."""
    shape = Shape(case.tokens, case.experts, case.top_k, case.model_dim, case.hidden_dim)
    with torch.device("cuda"):
        if case.layer == "dense":
            return dense(shape)
        contender = ours(shape, case.layer)
        if case.group > 1:
            shard_experts(contender.module, ExpertGroup(case.group, 0, None, None, case.group, True))
    return contender


def numbers_read(case: Case) -> Iterator[int]:
    """The numbers that the layer reads from the device, in order, when every expert gets equally many rows."""
    pairs = case.tokens * case.top_k
    if case.group > 1:  # plan_exchange: rows to each expert, rows for each of this rank's experts by rank
        yield from [pairs // case.experts] * (2 * case.experts)


class Saved:
    """The bytes that autograd keeps from forward to backward, apart from parameters and the input; shared memory once."""

    def __init__(self, contender: Contender, x: Tensor):
        self.tensors: List[Tensor] = []  # kept alive, so that no other takes the same memory
        self.known: Set[int] = {self._memory(tensor) for tensor in [*contender.module.parameters(), x]}

    def hooks(self) -> Any:
        return torch.autograd.graph.saved_tensors_hooks(self._save, lambda tensor: tensor)

    @property
    def bytes(self) -> int:
        return sum(map(size, self.tensors))

    def _save(self, tensor: Tensor) -> Tensor:
        if self._memory(tensor) not in self.known:
            self.known.add(self._memory(tensor))
            self.tensors.append(tensor)
        return tensor

    @staticmethod
    def _memory(tensor: Tensor) -> int:
        return tensor.untyped_storage()._cdata


@contextmanager
def sent_bytes() -> Iterator[List[int]]:
    """Record the bytes handed to each all-to-all, without sending."""
    sent: List[int] = []

    def record(received: Tensor, rows: Tensor, *_: Any, **__: Any) -> mock.Mock:
        sent.append(size(rows))
        return mock.Mock()  # the work to wait for

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(dist, "all_to_all_single", record))
        yield sent


def as_json(costs: Costs) -> Dict[str, Any]:
    return {**costs._asdict(), "kernels": [[*kernel, times] for kernel, times in costs.kernels]}


if __name__ == "__main__":
    json.dump([as_json(count(Case(*fields))) for fields in json.load(sys.stdin)], sys.stdout)
