"""Dispatchers: move routed tokens to experts and back. They are independent of routers, and experts of dispatchers."""

from fairseq_sparsemixer.moe.dispatch.all_to_all import dispatch_all_to_all
from fairseq_sparsemixer.moe.dispatch.equal_split import dispatch_equal_split
from fairseq_sparsemixer.moe.dispatch.fused import dispatch_fused
from fairseq_sparsemixer.moe.dispatch.local import dispatch_locally

__all__ = ["dispatch_all_to_all", "dispatch_equal_split", "dispatch_fused", "dispatch_locally"]
