"""What kernels for single rows must offer: the C kernels do, and so do Triton's (:mod:`deltas.ops.triton_rows`)."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from torch import Tensor


class RowKernels(Protocol):
    """Shapes, rounding and errors are those of :class:`deltas.ops.native.Kernels`; one dtype and device per call."""

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, out: Tensor) -> None: ...

    def silu_mul(self, gate: Tensor, up: Tensor, out: Tensor) -> None: ...

    def rope(self, x: Tensor, cos: Tensor, sin: Tensor) -> None: ...

    def kv_write(
        self, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, slots: Tensor, positions: Tensor
    ) -> None: ...

    def decode_attention(
        self,
        q: Tensor,
        keys: Tensor,
        values: Tensor,
        slots: Tensor,
        lengths: Tensor,
        scale: float,
        out: Tensor,
        firsts: Tensor | None = None,
        softcap: float | None = None,
        bias: Tensor | None = None,
    ) -> None: ...


@runtime_checkable
class PagedKernels(RowKernels, Protocol):
    """Row kernels that also reach keys and values in pages.

    ``pages`` int32 ``[slots, pages of a slot]`` says where a slot's tokens are: caches are ``[pages, kv_heads, tokens of
    a page, head_dim]``, and token p of a slot is in its page ``p // tokens of a page``.
    """

    def write_pages(
        self,
        k: Tensor,
        v: Tensor,
        keys: Tensor,
        values: Tensor,
        slots: Tensor,
        positions: Tensor,
        pages: Tensor,
    ) -> None: ...

    def attend_pages(
        self,
        q: Tensor,
        keys: Tensor,
        values: Tensor,
        slots: Tensor,
        lengths: Tensor,
        scale: float,
        out: Tensor,
        pages: Tensor,
        firsts: Tensor | None = None,
        softcap: float | None = None,
        bias: Tensor | None = None,
    ) -> None: ...
