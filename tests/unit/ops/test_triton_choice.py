"""Where the Triton kernels are used, and what is said where they cannot be."""

from __future__ import annotations

import pytest
import torch

from deltas import ops
from deltas.ops import Ops, triton_kernels
from deltas.ops.rows import PagedKernels

CPU = torch.device("cpu")


def test_not_on_a_cpu_unless_asked_for() -> None:
    assert Ops(1, CPU, torch.float32).mode in ("native", "dense")


def test_refusals_say_why(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RuntimeError, match=r"do not compute in torch\.float64"):
        Ops(1, torch.device("cuda"), torch.float64, "triton")
    monkeypatch.setattr(triton_kernels, "INTERPRETED", False)
    with pytest.raises(RuntimeError, match="run on CUDA devices, not on cpu"):
        Ops(1, CPU, torch.float32, "triton")
    monkeypatch.setattr(ops, "has_triton", lambda: False)
    with pytest.raises(RuntimeError, match="no package triton"):
        Ops(1, CPU, torch.float32, "triton")


def test_the_choice_on_a_cuda_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """The choice needs no device: nothing is put there."""
    cuda = torch.device("cuda")
    chosen = Ops(1, cuda, torch.bfloat16)
    assert chosen.mode == "triton"
    assert chosen.kernels is None
    assert isinstance(chosen.rows, PagedKernels)
    assert Ops(1, cuda, torch.float64).mode == "dense"
    monkeypatch.setattr(ops, "has_triton", lambda: False)
    assert Ops(1, cuda, torch.bfloat16).mode == "dense"


def test_the_c_kernels_reach_no_pages() -> None:
    assert not isinstance(Ops(1, CPU, torch.float32).rows, PagedKernels)
