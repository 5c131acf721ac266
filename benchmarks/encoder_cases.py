"""The cases of ``encoder_mixed.py``: ours, and the rivals'. Each kind runs in a process of its own:

    python -m benchmarks.encoder_cases ours|rivals|adapterhub SETTINGS

writes its cases as a JSON object ``{case: units}``, then takes lines ``[case, unit]`` and answers each by the seconds that
the unit took. SETTINGS are ``encoder_mixed``'s arguments as JSON. ``adapterhub`` needs AdapterHub's ``adapters``, which
wants another transformers than ours.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.common import RANK, REDUCTION, RunningEngine, make_delta

DELTAS = 32
LABELS = (2, 5, 151)
Unit = Callable[[], float]
"""Runs a part of a case's load and returns the seconds that it took."""
Cases = dict[str, list[Unit]]


def main() -> None:
    who, args = sys.argv[1], argparse.Namespace(**json.loads(sys.argv[2]))
    if who == "ours":
        from server.engine.memory import keep_pages

        keep_pages()
    import torch

    torch.set_num_threads(args.threads)
    rng = random.Random(1)
    rows = [[rng.randrange(1000, 30000) for _ in range(rng.randint(32, 128))] for _ in range(args.requests)]
    close: Callable[[], Any] = list
    with tempfile.TemporaryDirectory() as scratch:
        match who:
            case "ours" if args.engine:
                cases, close = by_engine(args, rows, Path(scratch))
            case "ours":
                cases = by_runner(args, rows)
            case "rivals":
                cases = rivals(args, rows)
            case _:
                cases = adapterhub(args, rows)
        print("CASES " + json.dumps({case: len(units) for case, units in cases.items()}), flush=True)
        for line in sys.stdin:
            case, unit = json.loads(line)
            print(cases[case][unit](), flush=True)
        close()


def wanted(args: argparse.Namespace, case: str) -> bool:
    return not args.cases or any(word in case for word in args.cases)


def cut(rows: Sequence[Any], size: int) -> list[Any]:
    return [rows[at : at + size] for at in range(0, len(rows), size)]


def parts(steps: Sequence[Any], rows: Sequence[Any], args: argparse.Namespace) -> int:
    """How many steps are as many rows as a batch has."""
    return max(1, int(len(steps) * args.batch // len(rows)))


def clock(args: argparse.Namespace) -> Callable[[], float]:
    return time.perf_counter if args.time == "wall" else time.process_time


def timed(clock: Callable[[], float], run: Callable[[], Any]) -> float:
    began = clock()
    run()
    return clock() - began


# -- ours ------------------------------------------------------------------------------------------------------


def mixes(spec: Any, kinds: Sequence[str], heads: bool) -> dict[str, list[Any]]:
    """The deltas of our cases, by case."""

    def make(names: Sequence[str], count: int) -> list[Any]:
        return [
            make_delta(spec, names[i % len(names)], i, labels=LABELS[i % len(LABELS)] if heads else 0)
            for i in range(count)
        ]

    mixed = make(kinds, DELTAS)
    what = f"32 deltas ({', '.join(kinds)})"
    return {
        "ours base": [],
        "ours 8 loras": make(["lora"], 8),
        "ours 32 loras": make(["lora"], DELTAS),
        "ours 32 bottlenecks": make(["bottleneck"], DELTAS),
        f"ours {what}": mixed,
        f"ours one after another, {what}": mixed,
    }


# -- ours ------------------------------------------------------------------------------------------------------


def by_runner(args: argparse.Namespace, rows: list[list[int]]) -> Cases:
    """Our cases, batch by batch, by the runner alone."""
    import torch

    from deltas import methods
    from deltas.pack import pack
    from server.engine import backbone as backbones
    from server.engine.batching import Batcher, EncodeJob
    from server.engine.encoder import EncoderRow, EncoderRunner
    from server.types import DeltaRef, EncoderInput, Want

    backbone = backbones.load("bench", Path(args.folder), torch.device("cpu"), getattr(torch, args.dtype))
    runner = EncoderRunner(backbone, mode=args.ops)
    spec = backbone.spec

    def units(deltas: list[Any], apart: bool) -> list[Unit]:
        placed = {d.digest: pack(methods.lower(d, spec), spec, backbone.dtype) for d in deltas}
        refs: list[DeltaRef | None] = [DeltaRef(d.digest, "") for d in deltas] or [None]
        batcher = Batcher(max_rows=args.batch, step_tokens=128 * args.batch, max_waiting=len(rows))
        given = list(range(len(rows)))
        if apart:
            given.sort(key=lambda i: i % len(refs))
        steps = []
        for i in given:
            batcher.add(EncodeJob(i, "t", EncoderInput(rows[i]), refs[i % len(refs)], Want("embedding"), 0.0))
            if len(batcher) == (len(rows) // len(refs) if apart else args.batch):
                jobs = batcher.next(lambda _: 0)
                steps.append([EncoderRow(job.row.ids, placed.get(job.digest)) for job in jobs])
        return [
            partial(timed, clock(args), partial(_each, runner.run, part))
            for part in cut(steps, parts(steps, rows, args))
        ]

    mixed = mixes(spec, args.kinds, heads=False)
    return {case: units(deltas, "after" in case) for case, deltas in mixed.items() if wanted(args, case)}


def _each(run: Callable[[Any], Any], inputs: Sequence[Any]) -> None:
    for given in inputs:
        run(given)


def by_engine(args: argparse.Namespace, rows: list[list[int]], scratch: Path) -> tuple[Cases, Any]:
    """Our cases, the whole load at once, through the step loop; and how to end it."""
    from server.engine.messages import Encode, Encoded, Failed
    from server.engine.process import EngineConfig
    from server.types import EncoderInput, Want

    config = EngineConfig(
        backbone=args.folder, backbone_name=None, data_dir=str(scratch), device="cpu", dtype=args.dtype,
        max_model_len=None, max_rows=args.batch, max_waiting=len(rows), prefill_tokens=128 * args.batch,
        kv_bytes=None, delta_bytes=4 << 30, host_delta_bytes=4 << 30, threads=args.threads, ops_mode=args.ops,
    )  # fmt: skip
    running = RunningEngine(config)

    def load(refs: list[Any]) -> float:
        def ended(reply: Any) -> int:
            if isinstance(reply, Failed):
                raise RuntimeError(reply.message)
            return len(reply.rows) if isinstance(reply, Encoded) else 0

        running.replies.clear()
        began = clock(args)()
        for i, ids in enumerate(rows):
            ref = refs[i % len(refs)] if refs else None
            want = Want("embedding" if ref is None else "head")
            running.engine.receive(Encode("t", [(i, EncoderInput(ids))], ref, want))
        running.wait(len(rows), ended)
        return clock(args)() - began

    spec = running.engine.runner.backbone.spec
    cases: Cases = {}
    for case, deltas in mixes(spec, args.kinds, heads=True).items():
        if "after" not in case and wanted(args, case):
            cases[case] = [partial(load, running.load(deltas, scratch))]
    return cases, running.close


# -- rivals ----------------------------------------------------------------------------------------------------


def rivals(args: argparse.Namespace, rows: list[list[int]]) -> Cases:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModel

    def plain() -> Any:
        return AutoModel.from_pretrained(
            args.folder, dtype=getattr(torch, args.dtype), add_pooling_layer=False
        ).eval()

    @torch.inference_mode()
    def forward(model: Any, batch: Any, names: list[str] | None = None) -> None:
        ids, mask = batch
        extra = {} if names is None else {"adapter_names": names}
        model(input_ids=ids, attention_mask=mask, **extra)

    def switched(model: Any, batches: Sequence[tuple[str, Any]]) -> None:
        for name, batch in batches:
            model.set_adapter(name)
            forward(model, batch)

    by_length = [padded(b) for b in cut(sorted(rows, key=len), args.batch)]
    cases: Cases = {}
    base = plain()
    for case, batches in {
        "plain, as given": [padded(b) for b in cut(rows, args.batch)],
        "plain, sorted by length": by_length,
    }.items():
        cases[case] = [partial(timed, clock(args), partial(forward, base, batch)) for batch in batches]
    for count in (8, DELTAS):
        mixed, apart = f"peft {count} loras", f"peft switching, {count} loras"
        if not (wanted(args, mixed) or (wanted(args, apart) and count == DELTAS)):
            continue
        lora = LoraConfig(
            r=RANK, lora_alpha=16, target_modules=["query", "key", "value", "dense"], init_lora_weights=False
        )
        model = get_peft_model(plain(), lora, adapter_name="a0")
        for i in range(1, count):
            model.add_adapter(f"a{i}", lora)
        model.eval()
        names = [f"a{i % count}" for i in range(args.batch)]
        cases[mixed] = [
            partial(timed, clock(args), partial(forward, model, batch, names[: len(batch[0])]))
            for batch in by_length
        ]
        if count == DELTAS:
            own = [(f"a{i}", padded(sorted(rows[i::count], key=len))) for i in range(count)]
            cases[apart] = [
                partial(timed, clock(args), partial(switched, model, part))
                for part in cut(own, parts(own, rows, args))
            ]
    return cases


def adapterhub(args: argparse.Namespace, rows: list[list[int]]) -> Cases:
    import adapters
    import torch
    from adapters.composition import BatchSplit
    from transformers import AutoModel

    dtype = getattr(torch, args.dtype)
    batches = [padded(b) for b in cut(sorted(rows, key=len), args.batch)]
    cases: Cases = {}
    loras = adapters.LoRAConfig(
        r=RANK, alpha=16, selfattn_lora=True, intermediate_lora=True, output_lora=True,
        attn_matrices=["q", "k", "v"],
    )  # fmt: skip
    for what, config in (
        ("bottlenecks", adapters.SeqBnConfig(reduction_factor=REDUCTION)),
        ("loras", loras),
    ):
        case = f"adapterhub {DELTAS} {what}"
        if not wanted(args, case):
            continue
        model: Any = AutoModel.from_pretrained(args.folder, dtype=dtype, add_pooling_layer=False)
        adapters.init(model)
        names = [f"a{i}" for i in range(DELTAS)]
        for name in names:
            model.add_adapter(name, config=config)
        model.to(dtype).eval()

        @torch.inference_mode()
        def forward(model: Any, names: list[str], batch: Any) -> None:
            ids, mask = batch
            rows = [names[i % DELTAS] for i in range(len(ids))]
            with adapters.AdapterSetup(BatchSplit(*rows, batch_sizes=[1] * len(ids))):
                model(input_ids=ids, attention_mask=mask)

        cases[case] = [
            partial(timed, clock(args), partial(forward, model, names, batch)) for batch in batches
        ]
    return cases


def padded(rows: list[list[int]]) -> tuple[Any, Any]:
    """Token ids and attention mask ``[rows, longest]``."""
    import torch

    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
    lengths = torch.tensor([len(row) for row in rows])
    return ids, (torch.arange(ids.shape[1]) < lengths[:, None]).long()


if __name__ == "__main__":
    main()
