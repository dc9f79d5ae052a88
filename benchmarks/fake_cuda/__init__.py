"""CUDA without a GPU: fake tensors on "cuda" in a CPU build of torch, to count what would run. Used by tests/gpu, too."""
