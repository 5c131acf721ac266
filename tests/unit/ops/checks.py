"""How the kernels' results are compared."""

from __future__ import annotations

import torch
from torch import Tensor

DTYPES = [torch.float32, torch.bfloat16]
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-8}  # of the largest value


def close(got: Tensor, want: Tensor, factor: float = 1.0) -> None:
    error = (got.double() - want.double()).abs().max().item()
    assert error <= factor * TOLERANCE[got.dtype] * max(1.0, want.abs().max().item())


def bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.int32 if x.dtype == torch.float32 else torch.int16)
