"""Linear maps of a few rows: oneDNN's product for float32 on a CPU, where a check on first use finds it right.

torch uses MKL or OpenBLAS there. For the few rows of an expert, oneDNN (shipped for torch.compile) takes about 3/4 of
MKL's time, bias included (benchmarks/NOTES.md). But it is one of torch's private operations, so another torch may lack
it or change it: F.linear then serves. N rows, I inputs, O outputs.
"""

from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor


def linear(rows: Tensor, weight: Tensor, bias: Optional[Tensor] = None) -> Tensor:
    """rows [N, I], weight [O, I] in any layout -> rows @ weight.T + bias, [N, O]; not differentiable."""
    return _product(rows, weight, bias) if takes_onednn(rows) else F.linear(rows, weight, bias)


def takes_onednn(rows: Tensor) -> bool:
    """Whether oneDNN multiplies these rows. It prepares a kernel for each new number of them."""
    if torch.compiler.is_compiling():  # traced code cannot run the check, and its compiler chooses a product
        return False
    return rows.device.type == "cpu" and rows.dtype == torch.float32 and onednn_is_right()


def _product(rows: Tensor, weight: Tensor, bias: Optional[Tensor]) -> Tensor:
    # not fused with relu: oneDNN's relu turns NaN into 0 and hides the failure
    product: Tensor = torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")
    return product


@lru_cache(maxsize=None)
def onednn_is_right() -> bool:
    """Whether oneDNN gives what F.linear gives; checked once in a process."""
    try:
        with ThreadPoolExecutor(1) as fresh:  # autocast and torch's other modes belong to the caller's thread
            return fresh.submit(_agrees_with_linear).result()
    except Exception:  # whatever it is, F.linear computes the same
        return False


@torch.no_grad()
def _agrees_with_linear() -> bool:
    """Compares the two products of a feed-forward network: a transposed weight with a bias, and a weight without one."""
    rows, weight, bias = _waves(33, 24), _waves(24, 40).t(), _waves(40)
    return all(
        torch.allclose(_product(rows, *layer), F.linear(rows, *layer), rtol=1e-5, atol=1e-5)
        for layer in ((weight, bias), (weight.contiguous(), None))
    )


def _waves(*shape: int) -> Tensor:
    """Numbers in [-1, 1], without torch's random state: a check must not change a training."""
    return torch.arange(torch.Size(shape).numel(), dtype=torch.float32, device="cpu").sin().view(shape)
