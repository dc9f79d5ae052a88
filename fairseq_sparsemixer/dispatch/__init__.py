"""Where tokens go once they are routed. A dispatcher knows nothing of routers, and experts nothing of dispatchers."""

from fairseq_sparsemixer.dispatch.local import dispatch_locally

__all__ = ["dispatch_locally"]
