"""Decoding on one GPU: base alone against the card's memory, mixed deltas against base alone, PEFT beside it.

    python -m benchmarks.gpu_decode [--shapes 1b 8b] [--rows 32] [--deltas 32 128 256] [--context 256] [--json FILE]
    python -m benchmarks.gpu_decode --tiny --device cpu        the same code on a small shape, for tests

Llama shapes with random weights, bfloat16, through the engine's own runner: paged KV, CUDA graphs, Triton kernels. A
case decodes ``--steps`` tokens for rows that hold ``--context`` tokens each, one delta a row where there are deltas:
LoRA (rank 8, all linears), bottleneck, BitFit and prefix in turn. More deltas than ``--rows`` means as many rows, and is
compared with as many rows of the base alone. The bound is the time to read the weights once and the keys and values of
every row, at the rate at which this card copies memory in the same run. Without a CUDA device it says so and ends.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import RANK, machine, make_delta

KINDS = ("lora", "bottleneck", "bitfit", "prefix")
VIRTUAL = 16
TARGETS = {"bound": 0.70, "base": 0.92}
SHAPES: dict[str, dict[str, int]] = {
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
           "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 128256},
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
           "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256},
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 256},
}  # fmt: skip


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def bandwidth(device: torch.device, nbytes: int) -> float:
    """Bytes a second that a copy within the device's memory reads and writes; the median of twenty."""
    source = torch.empty(nbytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * nbytes / median(lambda: target.copy_(source), device, 20)


def median(work: Callable[[], Any], device: torch.device, times: int) -> float:
    """Seconds, wall time, the device idle before and after; the first call is not counted."""
    work()
    spent = []
    for _ in range(times):
        synchronize(device)
        began = time.perf_counter()
        work()
        synchronize(device)
        spent.append(time.perf_counter() - began)
    return statistics.median(spent)


def llama(shape: str, device: torch.device, dtype: torch.dtype, **options: Any) -> Any:
    """A Llama of random weights, made on the device."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    sizes: dict[str, Any] = {**SHAPES[shape], "max_position_embeddings": 8192, "tie_word_embeddings": False}
    auto: Any = AutoModelForCausalLM
    torch.manual_seed(0)
    with torch.device(device):
        model = auto.from_config(LlamaConfig(**sizes), dtype=dtype, **options)
    return model.eval().requires_grad_(False)


def ours(shape: str, device: torch.device, dtype: torch.dtype) -> Any:
    """The same, with attention left to the engine."""
    from transformers import AttentionInterface

    from server.engine.backbone import ATTENTION, attention

    AttentionInterface.register(ATTENTION, attention)
    return llama(shape, device, dtype, attn_implementation=ATTENTION)


class Decoding:
    """The engine's runner over one model, and decode steps of rows that hold ``context`` tokens."""

    def __init__(self, args: argparse.Namespace, model: Any, device: torch.device) -> None:
        from deltas.backbones import describe
        from server.engine.backbone import Backbone
        from server.engine.cuda_graphs import cuda_graphs
        from server.engine.kv import KV, SlotKV
        from server.engine.paged import PAGE, PagedKV
        from server.engine.runner import Runner

        spec = describe(model.config, "random")
        dtype = next(model.parameters()).dtype
        parameters = sum(p.numel() for p in model.parameters())
        backbone = Backbone("random", Path(), spec, model, dtype, device, parameters)
        most = max([args.rows, *args.deltas])
        capacity = args.context + 2 * args.steps + VIRTUAL + PAGE
        on_gpu = device.type == "cuda"
        kv: KV = SlotKV(spec, most + 1, capacity, dtype, device)
        if on_gpu:
            kv = PagedKV(spec, most + 1, capacity, (most + 1) * capacity, dtype, device)
        graph = cuda_graphs() if on_gpu else None
        self.runner = Runner(backbone, kv, most, mode=args.ops, graph=graph)
        self._args, self._device = args, device
        self._numbers = iter(range(1 << 30))

    def load(self, count: int) -> list[Any]:
        """Deltas of the four kinds in turn, on the device."""
        from deltas import methods
        from deltas.pack import pack

        spec, dtype = self.runner.backbone.spec, self.runner.backbone.dtype
        made = (make_delta(spec, KINDS[n % len(KINDS)], n, virtual=VIRTUAL) for n in range(count))
        return [self.runner.finish(pack(methods.lower(d, spec), spec, dtype).to(self._device)) for d in made]

    def seconds(self, rows: int, deltas: list[Any]) -> float:
        """A decode step, median; the rows' keys and values are whatever is in their slots."""
        from server.engine.plan import PlannedRow
        from server.engine.sequence import Sequence
        from server.types import DeltaRef, SamplingParams

        sequences = []
        for slot in range(rows):
            delta = deltas[slot % len(deltas)] if deltas else None
            ref = None if delta is None else DeltaRef(str(slot), "")
            sampling = SamplingParams(max_tokens=1 << 20)
            row = Sequence(next(self._numbers), "bench", [3] * self._args.context, sampling, delta=ref)
            row.slot, row.computed, row.output = slot, self._args.context, [5]
            row.prefix = 0 if delta is None else delta.prefix_length
            self.runner.begin(row, delta)
            sequences.append((row, delta))

        def step() -> None:
            planned = [PlannedRow(row, row.computed, 1, samples=True) for row, _ in sequences]
            logits = self.runner.run(planned, [delta for _, delta in sequences]).logits
            tokens = logits.argmax(-1).tolist()  # as sampling does: the host waits for every step
            for (row, _), token in zip(sequences, tokens, strict=True):
                row.advance(1, token)

        return median(step, self._device, self._args.steps)


def peft_seconds(
    args: argparse.Namespace, shape: str, device: torch.device, dtype: torch.dtype, count: int
) -> float:
    """PEFT's mixed batch (``adapter_names``) on the same shape: transformers' cache and attention, LoRAs only."""
    from peft import LoraConfig, get_peft_model
    from transformers import DynamicCache

    plain = llama(shape, device, dtype)
    lora = LoraConfig(r=RANK, target_modules="all-linear", init_lora_weights=False)
    model: Any = get_peft_model(plain, lora, adapter_name="d0")
    for n in range(1, count):
        model.add_adapter(f"d{n}", lora)
    model.eval()
    names = [f"d{n}" for n in range(count)]
    cache = DynamicCache(config=plain.config)
    with torch.inference_mode():
        ids = torch.full((count, args.context), 3, device=device)
        model(input_ids=ids, past_key_values=cache, use_cache=True, adapter_names=names, logits_to_keep=1)

        def step() -> None:
            out = model(
                input_ids=ids[:, :1],
                past_key_values=cache,
                use_cache=True,
                adapter_names=names,
                logits_to_keep=1,
            )
            out.logits[:, -1].argmax(-1).tolist()

        return median(step, device, max(2, args.steps // 8))


def measure(args: argparse.Namespace, shape: str, device: torch.device, rate: float) -> list[dict[str, Any]]:
    """The lines of one shape."""
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    model = ours(shape, device, dtype)
    config = model.config
    read = sum(p.numel() for p in model.parameters()) - model.get_input_embeddings().weight.numel()
    per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    decoding = Decoding(args, model, device)
    lines: list[dict[str, Any]] = []
    base: dict[int, float] = {}

    def line(case: str, rows: int, seconds: float) -> None:
        bound = (read + rows * args.context * per_token) * dtype.itemsize / rate
        lines.append({
            "shape": shape, "case": case, "rows": rows, "ms": 1e3 * seconds, "tokens_per_second": rows / seconds,
            "of_bound": bound / seconds, "of_base": base[rows] / seconds,
        })  # fmt: skip

    for rows in sorted({args.rows, *(max(args.rows, count) for count in args.deltas)}):
        base[rows] = decoding.seconds(rows, [])
        line("base alone", rows, base[rows])
    for count in args.deltas:
        rows = max(args.rows, count)
        line(f"{count} deltas of four kinds", rows, decoding.seconds(rows, decoding.load(count)))
    del decoding, model
    if args.peft:
        line(
            f"PEFT adapter_names, {args.peft} LoRAs",
            args.rows,
            peft_seconds(args, shape, device, dtype, args.peft),
        )
    return lines


def table(lines: list[dict[str, Any]]) -> str:
    """As Markdown."""
    head = [
        "| shape | case | rows | ms a step | tokens/s | of the bound | of base |",
        "|---|---|---|---|---|---|---|",
    ]
    return "\n".join(
        head + [
            f"| {r['shape']} | {r['case']} | {r['rows']} | {r['ms']:.2f} | {r['tokens_per_second']:.0f} "
            f"| {r['of_bound']:.2f} | {r['of_base']:.2f} |" for r in lines
        ]
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", nargs="+", choices=["1b", "8b"], default=["1b", "8b"])
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--deltas", type=int, nargs="+", default=[32, 128, 256])
    parser.add_argument("--context", type=int, default=256, help="tokens that each row holds")
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument(
        "--peft", type=int, default=32, help="LoRAs of PEFT's case, as many as rows; 0: without it"
    )
    parser.add_argument("--ops", choices=["native", "triton", "dense", "reference"], default=None)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a small shape instead")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("gpu_decode: torch finds no CUDA device here; nothing was measured")
    if args.tiny:
        args.shapes, args.rows, args.deltas, args.context, args.steps = ["tiny"], 4, [4, 8], 24, 4
        args.peft = min(args.peft, args.rows)
    if args.peft not in (0, args.rows):
        raise SystemExit(f"gpu_decode: --peft takes 0 or as many LoRAs as there are rows, {args.rows}")
    device = torch.device(args.device)
    on_gpu = device.type == "cuda"
    card = torch.cuda.get_device_name(device) if on_gpu else machine()
    rate = bandwidth(device, 1 << (30 if on_gpu else 24))
    lines: list[dict[str, Any]] = []
    for shape in args.shapes:
        lines += measure(args, shape, device, rate)
    print(f"{card}, torch {torch.__version__}, memory copied at {rate / 1e9:.0f} GB/s\n\n{table(lines)}")
    if on_gpu:
        print(
            f"\ntargets: {TARGETS['bound']} of the bound for base alone, {TARGETS['base']} of base with deltas"
        )
    if args.json:
        args.json.write_text(
            json.dumps(
                {"card": card, "torch": torch.__version__, "bytes_per_second": rate, "lines": lines}, indent=1
            )
        )


if __name__ == "__main__":
    main()
