"""What a layer costs on any device: kernels, bytes, FLOPs, host waits, bytes sent. Imports no torch."""

from typing import List, NamedTuple, Tuple


class Kernel(NamedTuple):
    """One launch: bytes read and written in the device's memory, FLOPs of matrix products, and whether these are in float32."""

    name: str
    bytes: int
    flops: int
    float32: bool


class Case(NamedTuple):
    """One layer to count. layer: "dense" or a router; tokens S, experts E, experts per token k, model_dim M, hidden_dim H.

    The dense layer has the hidden dimension k * H. group: G, the ranks that share the experts; tokens are those of one rank.
    capability: the GPU's major compute capability, on which the choice of kernels depends.
    """

    layer: str
    tokens: int
    experts: int
    top_k: int
    model_dim: int
    hidden_dim: int
    group: int
    capability: int


class Costs(NamedTuple):
    """One forward and backward of a layer on one rank.

    kernels: (Kernel, launches of it). waits: how often the host waits for the device. sent: bytes of each all-to-all, with
    the rank's own share. saved: bytes kept from forward to backward, without parameters.
    """

    kernels: List[Tuple[Kernel, int]]
    waits: int
    sent: List[int]
    saved: int

    @property
    def launches(self) -> int:
        return sum(times for _, times in self.kernels)

    @property
    def flops(self) -> int:
        return sum(kernel.flops * times for kernel, times in self.kernels)

    @property
    def bytes(self) -> int:
        return sum(kernel.bytes * times for kernel, times in self.kernels)
