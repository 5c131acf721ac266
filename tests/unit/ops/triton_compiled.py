"""Compiles every Triton kernel for GPUs that are not here, as a process of its own: ``python -m ... CAPABILITY...``.

The compiler and its assembler need no device. Prints one line a kernel: its name, the capability, and ``v4`` where it
reads global memory 16 bytes at a time.
"""

from __future__ import annotations

import sys
from typing import Any

import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from deltas.ops import triton_attention, triton_kernels, triton_rows

CONSTANTS: dict[str, dict[str, Any]] = {
    "_shrink": {"SPLITS": 4, "DOT": tl.bfloat16, "TOKENS": 16, "RANKS": 16, "WIDTH": triton_kernels.WIDTH},
    "_expand": {
        "SPLITS": 4, "DOT": tl.bfloat16, "ALIGNED": True, "TOKENS": 16, "RANKS": 16, "OUT": triton_kernels.OUT,
    },
    "_rms_norm": {"N": 4096},
    "_silu_mul": {"BLOCK": triton_rows.BLOCK},
    "_rope": {"HEADS": 8, "HALF": 64},
    "_kv_write": {"PAGED": True, "HEADS": 8, "DIM": 128},
    "_attend": {
        "PAGED": True, "FIRSTS": True, "BIAS": True, "CAPPED": True, "DOT": tl.bfloat16, "PARTS": 8, "GROUP": 16,
        "DIM": 128, "KEYS": triton_attention.KEYS,
    },
    "_join": {"PARTS": 8, "DIM": 128},
}  # fmt: skip
FLOATS = {"eps", "scale", "softcap"}
WIDE = {"table", "slots", "positions", "firsts", "lengths"}
SINGLE = {"scratch", "sums", "tops", "weights", "bias"}
POINTERS = (
    WIDE
    | SINGLE
    | {"x", "y", "weight", "out", "gate", "up", "cos", "sin", "k", "v", "q", "keys", "values", "pages"}
)


def kind(name: str) -> str:
    """The type of an argument, by its name."""
    if name not in POINTERS:
        return "fp32" if name in FLOATS else "i32"
    if name == "pages":
        return "*i32"
    return "*i64" if name in WIDE else "*fp32" if name in SINGLE else "*bf16"


def main() -> None:
    for capability in map(int, sys.argv[1:]):
        for module in (triton_kernels, triton_rows, triton_attention):
            for name, constants in CONSTANTS.items():
                kernel = getattr(module, name, None)
                if kernel is None:
                    continue
                arguments = [a for a in kernel.arg_names if a not in constants]
                signature = {a: kind(a) for a in arguments}
                aligned = {
                    (kernel.arg_names.index(a),): [["tt.divisibility", 16]]
                    for a in arguments
                    if signature[a] != "fp32" and a not in ("heads", "group", "kv_heads")
                }
                source = ASTSource(
                    kernel,
                    signature | dict.fromkeys(constants, "constexpr"),
                    {(kernel.arg_names.index(c),): value for c, value in constants.items()},
                    aligned,
                )
                code = compile(source, target=GPUTarget("cuda", capability, 32))
                print(
                    name,
                    capability,
                    "v4" if "ld.global.v4" in code.asm["ptx"] else "-",
                    len(code.asm["cubin"]),
                )


if __name__ == "__main__":
    main()
