"""Compiles every Triton kernel for GPUs that are not here, as a process of its own: ``python -m ... CAPABILITY...``.

The compiler and its assembler need no device. Prints one line a kernel and variant: its name, the capability, ``v4``
where it reads global memory 16 bytes at a time, and the bytes of its machine code.
"""

from __future__ import annotations

import sys
from typing import Any

import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from deltas.ops import triton_attention, triton_kernels, triton_rows

CONSTANTS: dict[str, list[dict[str, Any]]] = {
    "_shrink": [
        {"SPLITS": parts, "DOT": dot, "TOKENS": 16, "RANKS": 16, "WIDTH": triton_kernels.WIDTH}
        for parts, dot in ((4, tl.bfloat16), (1, tl.float32))
    ],
    "_expand": [
        {"SPLITS": 4, "DOT": dot, "ALIGNED": aligned, "TOKENS": 16, "RANKS": 16, "OUT": triton_kernels.OUT}
        for aligned, dot in ((True, tl.bfloat16), (False, tl.float32))
    ],
    "_rms_norm": [{"N": 4096}],
    "_silu_mul": [{"BLOCK": triton_rows.BLOCK}],
    "_rope": [{"HEADS": 8, "HALF": 64}],
    "_kv_write": [{"PAGED": paged, "HEADS": 8, "DIM": 128} for paged in (True, False)],
    "_attend": [
        {
            "PAGED": on, "FIRSTS": on, "BIAS": on, "CAPPED": on, "DOT": dot, "PARTS": 8, "GROUP": 16, "DIM": 128,
            "KEYS": triton_attention.KEYS,
        }
        for on, dot in ((True, tl.bfloat16), (False, tl.bfloat16), (False, tl.float32))
    ],
    "_join": [{"PARTS": 8, "DIM": 128}],
}  # fmt: skip
FLOATS = {"eps", "scale", "softcap"}
WIDE = {"table", "slots", "positions", "firsts", "lengths"}
SINGLE = {"scratch", "sums", "tops", "weights", "bias"}
POINTERS = (
    WIDE
    | SINGLE
    | {"x", "y", "weight", "out", "gate", "up", "cos", "sin", "k", "v", "q", "keys", "values", "pages"}
)


def kind(name: str, element: str) -> str:
    """The type of an argument, by its name."""
    if name not in POINTERS:
        return "fp32" if name in FLOATS else "i32"
    if name == "pages":
        return "*i32"
    return "*i64" if name in WIDE else "*fp32" if name in SINGLE else f"*{element}"


def compiled(kernel: Any, constants: dict[str, Any], capability: int) -> Any:
    """The machine code and what led to it, for arguments that are multiples of 16, as they usually are."""
    arguments = [a for a in kernel.arg_names if a not in constants]
    element = "fp32" if constants.get("DOT") is tl.float32 else "bf16"
    signature = {a: kind(a, element) for a in arguments} | dict.fromkeys(constants, "constexpr")
    aligned = {
        (kernel.arg_names.index(a),): [["tt.divisibility", 16]]
        for a in arguments
        if signature[a] != "fp32" and a not in ("heads", "group", "kv_heads")
    }
    values = {(kernel.arg_names.index(c),): value for c, value in constants.items()}
    return compile(ASTSource(kernel, signature, values, aligned), target=GPUTarget("cuda", capability, 32))


def main() -> None:
    modules = (triton_kernels, triton_rows, triton_attention)
    kernels = {name: next(getattr(m, name) for m in modules if hasattr(m, name)) for name in CONSTANTS}
    for capability in map(int, sys.argv[1:]):
        for name, variants in CONSTANTS.items():
            for constants in variants:
                code = compiled(kernels[name], constants, capability).asm
                print(name, capability, "v4" if "ld.global.v4" in code["ptx"] else "-", len(code["cubin"]))


if __name__ == "__main__":
    main()
