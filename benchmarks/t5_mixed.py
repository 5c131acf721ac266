"""32 requests with sources of 32 to 128 tokens and 32 new tokens each, on a T5 of T5-small's shape: what mixing costs.

    python -m benchmarks.t5_mixed [--dtype float32] [--rows 32] [--new 32] [--json FILE]

Six layers a stack, d_model 512, eight heads of 64, d_ff 2048, a vocabulary of 32,128; weights are random, since no time
here depends on their values. Ours, through the engine's whole step loop: base only, 32 LoRAs (rank 8, all linears), 32
deltas of ``--kinds``. Rivals, in the same run on the same weights: transformers' ``generate`` on one padded batch, and
PEFT over 32 LoRAs, mixed (``adapter_names``) and switching, one request after another.

Cases take turns in rounds, forwards and backwards, since the machine may be shared: a case's figure is its best, and
beside it the median. Ratios are of best figures of one run. Where other work keeps the cores busy, ``--threads 1 --time
cpu`` gives steady figures.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.common import RANK, RunningEngine, machine, make_delta

DELTAS = 32
START, END = 0, 1
Cases = dict[str, Callable[[], None]]


def write_backbone(folder: Path) -> None:
    """The model, and a tokenizer that nothing here asks."""
    import torch
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

    torch.manual_seed(1)
    config = T5Config()
    config.decoder_start_token_id = START
    T5ForConditionalGeneration(config).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({"<pad>": START, "</s>": END, "<unk>": 2}, "<unk>"))
    fast: Any = PreTrainedTokenizerFast
    fast(tokenizer_object=words, eos_token="</s>", pad_token="<pad>").save_pretrained(folder)


def sources(rows: int) -> list[list[int]]:
    rng = random.Random(1)
    return [[*(rng.randrange(3, 32000) for _ in range(rng.randint(31, 127))), END] for _ in range(rows)]


def ours(args: argparse.Namespace, folder: Path, scratch: Path) -> tuple[Cases, RunningEngine]:
    from server.engine.messages import Failed, Step, Submit
    from server.engine.process import EngineConfig
    from server.types import SamplingParams

    config = EngineConfig(
        backbone=str(folder), backbone_name=None, data_dir=str(scratch), device="cpu", dtype=args.dtype,
        max_model_len=512, max_rows=args.rows, max_waiting=args.rows, prefill_tokens=args.prefill, kv_bytes=None,
        delta_bytes=4 << 30, host_delta_bytes=4 << 30, threads=args.threads, ops_mode=args.ops,
    )  # fmt: skip
    running = RunningEngine(config)
    sampling = SamplingParams(max_tokens=args.new, temperature=0.0, ignore_eos=True)

    def ended(reply: Any) -> int:
        if isinstance(reply, Failed):
            raise RuntimeError(reply.message)
        return (
            sum(event.finish_reason is not None for _, event in reply.events)
            if isinstance(reply, Step)
            else 0
        )

    def load(refs: list[Any]) -> None:
        running.replies.clear()
        for i, source in enumerate(sources(args.rows)):
            ref = refs[i % len(refs)] if refs else None
            running.engine.receive(Submit(i, "t", [START], ref, sampling, source))
        running.wait(args.rows, ended)

    cases: Cases = {}
    mixes = {
        "ours base": [],
        f"ours {DELTAS} loras": ["lora"],
        f"ours {DELTAS} deltas ({', '.join(args.kinds)})": args.kinds,
    }
    spec = running.engine.runner.backbone.spec
    for case, kinds in mixes.items():
        if wanted(args, case):
            deltas = [make_delta(spec, kinds[i % len(kinds)], i) for i in range(DELTAS if kinds else 0)]
            cases[case] = partial(load, running.load(deltas, scratch))
    return cases, running


def rivals(args: argparse.Namespace, folder: Path) -> Cases:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForSeq2SeqLM

    rows = [torch.tensor(source) for source in sources(args.rows)]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=START)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)

    @torch.inference_mode()
    def generate(model: Any, rows: Any, mask: Any, **extra: Any) -> None:
        model.generate(
            input_ids=rows, attention_mask=mask, max_new_tokens=args.new, min_new_tokens=args.new, do_sample=False,
            **extra,
        )  # fmt: skip

    def switching(model: Any) -> None:
        for i, row in enumerate(rows):
            model.set_adapter(f"a{i % DELTAS}")
            generate(model, row[None], torch.ones_like(row)[None])

    def plain() -> Any:
        return AutoModelForSeq2SeqLM.from_pretrained(folder, dtype=getattr(torch, args.dtype)).eval()

    mixed, apart = f"peft {DELTAS} loras", f"peft switching, {DELTAS} loras"
    cases: Cases = {"generate base": partial(generate, plain(), ids, mask)}
    if wanted(args, mixed) or wanted(args, apart):
        linears = ["q", "k", "v", "o", "wi", "wo"]
        lora = LoraConfig(task_type="SEQ_2_SEQ_LM", r=RANK, target_modules=linears, init_lora_weights=False)
        model: Any = get_peft_model(plain(), lora, adapter_name="a0")
        for i in range(1, DELTAS):
            model.add_adapter(f"a{i}", lora)
        model.eval()
        names = [f"a{i % DELTAS}" for i in range(args.rows)]
        cases[mixed] = partial(generate, model, ids, mask, adapter_names=names)
        cases[apart] = partial(switching, model)
    return {case: run for case, run in cases.items() if wanted(args, case)}


def wanted(args: argparse.Namespace, case: str) -> bool:
    return not args.cases or any(word in case for word in args.cases)


def measure(cases: Cases, rounds: int, clock: Callable[[], float]) -> dict[str, list[float]]:
    """Seconds by case and round. A first round, not counted, warms up."""
    seconds: dict[str, list[float]] = {case: [] for case in cases}
    for turn in range(rounds + 1):
        for case in list(cases) if turn % 2 else reversed(cases):
            began = clock()
            cases[case]()
            if turn:
                seconds[case].append(clock() - began)
    return seconds


def report(args: argparse.Namespace, seconds: dict[str, list[float]]) -> None:
    load = f"{args.rows} requests, {args.new} new tokens"
    print(f"\n{machine()}; {args.dtype}; {args.threads} threads, {args.time} time; {load}")
    print(f"{'':52} {'tokens/s':>9} {'median':>8} {'to our base':>12} {'to generate':>12}")
    rate = {case: args.rows * args.new / min(found) for case, found in seconds.items()}
    for case, best in rate.items():
        usual = args.rows * args.new / statistics.median(seconds[case])
        against = [rate.get("ours base"), rate.get("generate base")]
        ratios = [f"{best / other:12.2f}" if other else " " * 12 for other in against]
        print(f"{case:52} {best:9.0f} {usual:8.0f} {ratios[0]} {ratios[1]}")
    if args.json:
        settings = {k: v for k, v in vars(args).items() if k not in ("json", "clock")}
        results = {case: {"tokens_s": rate[case], "seconds": found} for case, found in seconds.items()}
        args.json.write_text(
            json.dumps({"machine": machine(), "settings": settings, "results": results}, indent=1)
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dtype", default="float32", choices=["bfloat16", "float32"])
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--new", type=int, default=32)
    parser.add_argument("--kinds", nargs="+", default=["lora", "bottleneck", "bitfit", "prefix"])
    parser.add_argument("--prefill", type=int, default=512)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--time", default="wall", choices=["wall", "cpu"], help="cpu: of all threads")
    parser.add_argument(
        "--ops", default=None, help="native, dense or reference (default: the fastest there is)"
    )
    parser.add_argument("--cases", nargs="*", default=None, help="only cases that contain one of these words")
    parser.add_argument("--json", type=Path, default=None)
    args = parser.parse_args()
    args.clock = time.perf_counter if args.time == "wall" else time.process_time

    import torch
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as scratch:
        write_backbone(Path(folder))
        cases, running = ours(args, Path(folder), Path(scratch))
        try:
            report(args, measure(cases | rivals(args, Path(folder)), args.repeat, args.clock))
        finally:
            running.close()


if __name__ == "__main__":
    main()
