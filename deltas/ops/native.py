"""The C kernels of ``kernels.c``, loaded with ctypes and called on torch tensors.

They share torch's threads: ``torch.set_num_threads``, called on the thread that calls them, governs them too.
"""

from __future__ import annotations

import ctypes
import functools
import logging
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from deltas.ops import build

log = logging.getLogger(__name__)

ENTRY_FIELDS = (
    "row0", "rows", "rank", "down", "down_bias", "up", "gain", "shift", "out0", "out", "activation", "reads",
)  # fmt: skip
"""Columns of the patch table, as in the C source's ``entry``: int64, tensors as addresses, 0 for none."""

ROW_FIELDS = ("row0", "rows", "keys", "values", "before")
"""Columns of the table of :meth:`Kernels.ragged_attention`, as in the C source's ``ragged_row``: likewise."""

DTYPES = {torch.float32: "f32", torch.bfloat16: "bf16"}

_P, _I, _F = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
_SIGNATURES: dict[str, tuple[type, ...]] = {
    "ds_patch": (_P, _I, _P, _I, _I, _P, _I, _I, _I),
    "ds_sparse": (_P, _P, _P, _I, _I, _P, _I, _P, _I, _I),
    "ds_linear_panel": (),
    "ds_pack_linear": (_P, _I, _I, _I, _P),
    "ds_linear": (_P, _I, _P, _P, _I, _I, _I, _P, _I),
    "ds_rms_norm": (_P, _I, _P, _F, _I, _I, _P, _I),
    "ds_silu_mul": (_P, _I, _P, _I, _I, _I, _P, _I),
    "ds_rope": (_P, _I, _I, _I, _I, _P, _P, _I, _I),
    "ds_kv_write": (_P, _I, _I, _P, _I, _I, _P, _P, _I, _I, _I, _I, _I, _P, _P, _I, _I, _I),
    "ds_decode_attention": (
        _P, _I, _I, _P, _P, _I, _I, _I, _I, _I, _P, _P, _P, _I, _I, _I, _I, _F, _F, _P, _I, _I,
        _P, _I, _I,
    ),
    "ds_ragged_attention": (
        _P, _I, _I, _P, _I, _I, _P, _I, _I, _I, _P, _I, _I, _I, _I, _F, _I, _P, _I, _I,
    ),
}  # fmt: skip

_Functions = dict[torch.dtype, Callable[..., int]]


def _check(result: int) -> None:
    if result == -1:
        raise MemoryError("a kernel could not allocate its scratch space")
    if result != 0:
        raise IndexError("a kernel was given an index or a size outside its tensors")


def _rows_of(x: Tensor, name: str) -> int:
    """The row stride of a matrix whose rows are contiguous."""
    ld, inner = x.stride()
    if inner != 1 and x.shape[1] != 1:
        raise ValueError(f"{name}: rows must be contiguous, not strided by {inner}")
    return ld


class Kernels:
    """Thin methods over the library, for CPU tensors of float32 or bfloat16 (one dtype per call).

    Every method computes in float32, rounds once on store (exceptions are noted), and lets a NaN reach its
    own row only. Wrong shapes raise ValueError, indices outside a tensor IndexError, another dtype KeyError.
    The memory that a table's addresses name must be alive and of the shapes that the table says: that cannot
    be checked here.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        library.ds_threads.restype = ctypes.c_int

        def functions(name: str) -> _Functions:
            found: _Functions = {}
            for dtype, suffix in DTYPES.items():
                function = library[f"{name}_{suffix}"]
                function.argtypes = _SIGNATURES[name]
                function.restype = ctypes.c_int
                found[dtype] = function
            return found

        self._patch = functions("ds_patch")
        self._sparse = functions("ds_sparse")
        self._linear_panel = functions("ds_linear_panel")
        self._pack_linear = functions("ds_pack_linear")
        self._linear = functions("ds_linear")
        self._rms_norm = functions("ds_rms_norm")
        self._silu_mul = functions("ds_silu_mul")
        self._rope = functions("ds_rope")
        self._kv_write = functions("ds_kv_write")
        self._decode_attention = functions("ds_decode_attention")
        self._ragged_attention = functions("ds_ragged_attention")

    def threads(self) -> int:
        """The number of threads a kernel called from this thread may use."""
        return int(self._library.ds_threads())

    def patch(self, table: npt.NDArray[np.int64], x: Tensor, y: Tensor) -> None:
        """Applies a table's patches to ``y`` in place.

        ``table`` ``[entries, len(ENTRY_FIELDS)]``, C-contiguous. ``x`` ``[tokens, in]`` is the site's input,
        or the residual at a block site; ``y`` ``[tokens, columns]``. Factors have y's dtype. Entries may
        share (token, column) pairs only when one directly follows the other with the same tokens; then they
        apply in order. In bfloat16 a sum of two inputs is rounded to it, and so are, where the processor has
        products of bfloat16, the ``rank`` hidden values.
        """
        address = _address(table, ENTRY_FIELDS)
        tokens, width = x.shape
        if x.dtype != y.dtype or y.shape[0] != tokens:
            raise ValueError("x and y must have one dtype and the same tokens")
        columns = y.shape[1]
        _check(
            self._patch[y.dtype](
                address, len(table), x.data_ptr(), _rows_of(x, "x"), width,
                y.data_ptr(), _rows_of(y, "y"), tokens, columns,
            )
        )  # fmt: skip

    def sparse(self, starts: Tensor, columns: Tensor, values: Tensor, x: Tensor, y: Tensor) -> None:
        """``y += x S^T`` for a sparse S by rows: row i has ``values[k]`` at ``columns[k]``, k from ``starts[i]`` on.

        ``x`` ``[tokens, in]``, ``y`` ``[tokens, out]``; ``starts`` int32 ``[out + 1]``, ``columns`` int32 and
        ``values`` ``[count]``, contiguous. That every column is below ``in`` is the caller's business.
        """
        (tokens, width), (rows, out) = x.shape, y.shape
        if (
            rows != tokens or starts.shape != (out + 1,) or values.shape != columns.shape
            or not (starts.dtype == columns.dtype == torch.int32) or not (x.dtype == values.dtype == y.dtype)
            or not (starts.is_contiguous() and columns.is_contiguous() and values.is_contiguous())
        ):  # fmt: skip
            raise ValueError("sparse: shapes, strides or dtypes do not fit together")
        _check(
            self._sparse[y.dtype](
                starts.data_ptr(), columns.data_ptr(), values.data_ptr(), out, width,
                x.data_ptr(), _rows_of(x, "x"), y.data_ptr(), _rows_of(y, "y"), tokens,
            )
        )  # fmt: skip

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
    ) -> None:
        """One query token per row over its slot: exact softmax, grouped query heads, any length.

        ``q``, ``out`` ``[rows, heads, head_dim]``; ``keys``, ``values`` of one layer ``[slots, kv_heads,
        tokens, head_dim]``, any strides but the same for both; ``slots``, ``lengths`` int64 ``[rows]``
        (visible keys, the current token's included; 0 gives zeros). head_dim is contiguous, at most 512.
        ``firsts`` int64 ``[rows]``: where in the slot the visible keys begin, 0 without it. ``softcap`` c turns
        every score s into c tanh(s / c). ``bias`` float32 ``[rows, heads, n]``, contiguous in n, is added to the scores
        of the visible keys, of which no row may have more than n.

        The tokens of a prompt's chunk are rows as well, of one slot and with growing lengths: one call serves a
        step's prompts and its decoding rows.
        """
        rows, heads, head_dim = q.shape
        c_slots, kv_heads, c_tokens, cache_dim = keys.shape
        q_row, q_head, q_inner = q.stride()
        out_row, out_head, out_inner = out.stride()
        strides = keys.stride()
        if (
            cache_dim != head_dim or heads % kv_heads or out.shape != q.shape or values.shape != keys.shape
            or values.stride() != strides or not (q_inner == out_inner == strides[3] == 1)
            or not (q.dtype == keys.dtype == values.dtype == out.dtype)
        ):  # fmt: skip
            raise ValueError("decode_attention: shapes, strides or dtypes do not fit together")
        _check_indices(slots, rows, "slots")
        _check_indices(lengths, rows, "lengths")
        if firsts is not None:
            _check_indices(firsts, rows, "firsts")
        bias_row, bias_head = (0, 0) if bias is None else _check_bias(bias, rows, heads, lengths)
        _check(
            self._decode_attention[q.dtype](
                q.data_ptr(), q_row, q_head, keys.data_ptr(), values.data_ptr(),
                strides[0], strides[1], strides[2], c_slots, c_tokens, slots.data_ptr(),
                None if firsts is None else firsts.data_ptr(), lengths.data_ptr(),
                rows, heads, kv_heads, head_dim, scale, softcap or 0.0,
                None if bias is None else bias.data_ptr(), bias_row, bias_head, out.data_ptr(), out_row, out_head,
            )
        )  # fmt: skip

    def ragged_attention(
        self,
        table: npt.NDArray[np.int64],
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float,
        out: Tensor,
        window: int | None = None,
    ) -> None:
        """Exact attention of packed rows of any length, each to all of its own tokens and to its prefix.

        ``q``, ``out`` ``[tokens, heads, head_dim]``, ``k``, ``v`` ``[tokens, kv_heads, head_dim]``, head_dim
        contiguous. ``table`` ``[rows, len(ROW_FIELDS)]``, C-contiguous: a row's tokens ``row0 .. row0+rows``, and its
        prefix, ``before`` keys and values ``[before, kv_heads, head_dim]`` of q's dtype, contiguous, by address (0
        where there are none). Tokens of no row are left alone in ``out``. With a ``window`` token i of a row sees
        its prefix and the tokens j with ``|i - j| < window``.
        """
        tokens, heads, head_dim = q.shape
        kv_heads = k.shape[1]
        (q_token, q_head, q_inner), (k_token, k_head, k_inner) = q.stride(), k.stride()
        (v_token, v_head, v_inner), (out_token, out_head, out_inner) = v.stride(), out.stride()
        if (
            k.shape != (tokens, kv_heads, head_dim) or v.shape != k.shape or out.shape != q.shape
            or heads % kv_heads or not (q_inner == k_inner == v_inner == out_inner == 1)
            or not (q.dtype == k.dtype == v.dtype == out.dtype) or (window is not None and window < 1)
        ):  # fmt: skip
            raise ValueError("ragged_attention: shapes, strides, dtypes or the window do not fit together")
        _check(
            self._ragged_attention[q.dtype](
                q.data_ptr(), q_token, q_head, k.data_ptr(), k_token, k_head, v.data_ptr(), v_token, v_head,
                tokens, _address(table, ROW_FIELDS), len(table), heads, kv_heads, head_dim, scale, window or 0,
                out.data_ptr(), out_token, out_head,
            )
        )  # fmt: skip

    def kv_write(
        self, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, slots: Tensor, positions: Tensor
    ) -> None:
        """Copies new ``k``, ``v`` to ``(slots[t], :, positions[t])`` of the caches.

        ``k``, ``v`` ``[tokens, kv_heads, head_dim]``; ``slots``, ``positions`` int64 ``[tokens]``; caches as
        in :meth:`decode_attention`.
        """
        tokens, kv_heads, head_dim = k.shape
        c_slots, c_heads, c_tokens, cache_dim = keys.shape
        k_token, k_head, k_inner = k.stride()
        v_token, v_head, v_inner = v.stride()
        strides = keys.stride()
        if (
            cache_dim != head_dim or c_heads != kv_heads or v.shape != k.shape or values.shape != keys.shape
            or values.stride() != strides or not (k_inner == v_inner == strides[3] == 1)
            or not (k.dtype == v.dtype == keys.dtype == values.dtype)
        ):  # fmt: skip
            raise ValueError("kv_write: shapes, strides or dtypes do not fit together")
        _check_indices(slots, tokens, "slots")
        _check_indices(positions, tokens, "positions")
        _check(
            self._kv_write[k.dtype](
                k.data_ptr(), k_token, k_head, v.data_ptr(), v_token, v_head,
                keys.data_ptr(), values.data_ptr(), strides[0], strides[1], strides[2], c_slots, c_tokens,
                slots.data_ptr(), positions.data_ptr(), tokens, kv_heads, head_dim,
            )
        )  # fmt: skip

    def packs(self, weight: Tensor) -> bool:
        """Whether :meth:`pack_linear` takes such a weight: this processor has the instructions, and ``in`` is even."""
        functions = self._linear_panel.get(weight.dtype)
        return functions is not None and functions() > 0 and weight.shape[1] % 2 == 0

    def pack_linear(self, weight: Tensor) -> Tensor:
        """A weight ``[out, in]`` as :meth:`linear` reads it: flat, ``out`` rounded up to whole panels, times ``in``."""
        if not self.packs(weight):
            raise ValueError(f"a weight {tuple(weight.shape)} of {weight.dtype} cannot be packed here")
        weight = weight.contiguous()
        out, width = weight.shape
        panel = self._linear_panel[weight.dtype]()
        packed = weight.new_empty(-(-out // panel) * panel * width)
        _check(self._pack_linear[weight.dtype](weight.data_ptr(), width, out, width, packed.data_ptr()))
        return packed

    def linear(self, x: Tensor, packed: Tensor, bias: Tensor | None, out: int) -> Tensor:
        """``x W^T + bias`` ``[tokens, out]`` of ``x`` ``[tokens, in]``, for W from :meth:`pack_linear`; ``bias`` ``[out]``.

        A row's result depends neither on the other rows nor on how many there are. Sums are in float32.
        """
        tokens, width = x.shape
        panel = self._linear_panel[x.dtype]()
        if packed.dtype != x.dtype or panel == 0 or packed.numel() != -(-out // panel) * panel * width:
            raise ValueError("the packed weight does not fit the input")
        if bias is not None and (bias.dtype != x.dtype or bias.shape != (out,) or not bias.is_contiguous()):
            raise ValueError("the bias must be contiguous, [out], and of the input's dtype")
        y = x.new_empty(tokens, out)
        _check(
            self._linear[x.dtype](
                x.data_ptr(), _rows_of(x, "x"), packed.data_ptr(), None if bias is None else bias.data_ptr(),
                tokens, width, out, y.data_ptr(), out,
            )
        )  # fmt: skip
        return y

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, out: Tensor) -> None:
        """``out = weight * (x / rms(x))``, rounded between the two as Llama does; ``[rows, n]``.

        ``weight`` ``[n]``; ``out`` may be ``x``.
        """
        rows, n = x.shape
        if out.shape != x.shape or weight.shape != (n,) or not (x.dtype == weight.dtype == out.dtype):
            raise ValueError("rms_norm: shapes or dtypes do not fit together")
        ldx, ldy = _rows_of(x, "x"), _rows_of(out, "out")
        _check(
            self._rms_norm[x.dtype](
                x.data_ptr(), ldx, weight.contiguous().data_ptr(), eps, rows, n, out.data_ptr(), ldy
            )
        )

    def silu_mul(self, gate: Tensor, up: Tensor, out: Tensor) -> None:
        """``out = silu(gate) * up``, silu rounded to the dtype first; ``[rows, n]``.

        ``out`` may be ``gate`` or ``up``.
        """
        rows, n = gate.shape
        if up.shape != gate.shape or out.shape != gate.shape or not (gate.dtype == up.dtype == out.dtype):
            raise ValueError("silu_mul: shapes or dtypes do not fit together")
        _check(
            self._silu_mul[gate.dtype](
                gate.data_ptr(), _rows_of(gate, "gate"), up.data_ptr(), _rows_of(up, "up"), rows, n,
                out.data_ptr(), _rows_of(out, "out"),
            )
        )  # fmt: skip

    def rope(self, x: Tensor, cos: Tensor, sin: Tensor) -> None:
        """Rotates ``x`` ``[tokens, heads, head_dim]`` in place (the half-split convention), products rounded.

        ``cos``, ``sin`` ``[tokens, rotary]``; the first ``rotary`` dimensions turn, the others stay.
        """
        tokens, heads, head_dim = x.shape
        rotary = cos.shape[1]
        x_token, x_head, inner = x.stride()
        ldc = _rows_of(cos, "cos")
        if (
            cos.shape[0] != tokens or sin.shape != cos.shape or sin.stride() != cos.stride() or inner != 1
            or rotary % 2 or rotary > head_dim or not (x.dtype == cos.dtype == sin.dtype)
        ):  # fmt: skip
            raise ValueError("rope: shapes, strides or dtypes do not fit together")
        _check(
            self._rope[x.dtype](
                x.data_ptr(), x_token, x_head, tokens, heads, cos.data_ptr(), sin.data_ptr(), ldc, rotary
            )
        )


def _address(table: npt.NDArray[np.int64], fields: tuple[str, ...]) -> int:
    interface = table.__array_interface__
    if interface["strides"] is not None or table.dtype != np.int64 or table.shape[1:] != (len(fields),):
        raise ValueError(f"table: contiguous int64 [lines, {len(fields)}] expected")
    address: int = interface["data"][0]
    return address


def _check_indices(indices: Tensor, count: int, name: str) -> None:
    if indices.dtype != torch.int64 or indices.shape != (count,) or not indices.is_contiguous():
        raise ValueError(f"{name}: contiguous int64 [{count}] expected")


def _check_bias(bias: Tensor, rows: int, heads: int, lengths: Tensor) -> tuple[int, int]:
    """The strides by row and by head of what is added to scores."""
    by_row, by_head, inner = bias.stride()
    if bias.dtype != torch.float32 or bias.shape[:2] != (rows, heads) or (inner != 1 and bias.shape[2] > 1):
        raise ValueError(f"bias: float32 [{rows}, {heads}, keys], contiguous in the keys, expected")
    if rows and bias.shape[2] < int(lengths.max()):
        raise ValueError("bias: fewer keys than a row sees")
    return by_row, by_head


def load() -> Kernels | None:
    """The kernels, compiled at the first call on a machine and loaded once per process.

    None where that is impossible (:func:`why_unavailable` says why); the caller then uses torch operations.
    """
    return _load()[0]


def why_unavailable() -> str | None:
    """The reason that :func:`load` returns None; None where the kernels are available."""
    return _load()[1]


@functools.cache
def _load() -> tuple[Kernels | None, str | None]:
    try:
        return Kernels(build.library(build.cache_folder())), None
    except build.BuildFailed as error:
        log.warning("no C kernels: %s", error)
        return None, str(error)
