"""Fused kernels of the MoE layer for GPUs: one Triton kernel per file, each behind a torch.library custom op.

    ops.py         the custom ops: what they compute, on which device by what, and their fake implementations
    reference.py   the same in PyTorch: what the kernels are tested against, and what runs on a CPU
    choice.py      when the layer uses them
    functions.py   the autograd functions made of them

Triton is imported when a kernel runs, not before. S tokens, k choices, P = S * k pairs, N rows in order of their experts, E
experts, model dimension M, hidden dimension H; I is H, or 2H for gated activations; ends [E] int32: where each expert's rows end.
"""
