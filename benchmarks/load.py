"""A load on a whole server, over HTTP: ``deltaserve bench`` against a ``deltaserve serve`` of its own.

    python -m benchmarks.load [--rate 2] [--requests 60] [--json FILE]

The server runs as a user starts it, on a free port and a data folder of its own. It gets 12 deltas, three of each of four
kinds, and a task that generates by the first. The load is an open loop: a Poisson process of ``--rate`` requests a second,
zipf over the deltas, the backbone and the task; models are asked by streamed completions and chats in equal parts. What is
printed, and written as JSON, is ``deltaserve bench``'s: throughput, and time to first token and between tokens by kind.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx

from benchmarks.common import backbone_folder, make_delta

KINDS = ("lora", "bottleneck", "bitfit", "prompt")
DELTAS = 12
TASK = "shorten"
START_S = 180


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-c", "from server.cli import main; main()", *arguments]


def wait_for(server: subprocess.Popen[bytes], output: Path) -> str:
    """The server's address, once it is ready."""
    ends = time.monotonic() + START_S
    while time.monotonic() < ends:
        if server.poll() is not None:
            raise SystemExit(f"the server ended with {server.returncode}:\n{output.read_text()[-3000:]}")
        found = re.search(r"deltaserve listens on (http://\S+)", output.read_text())
        try:
            if found and httpx.get(f"{found[1]}/health/ready", timeout=10).status_code == 200:
                return found[1]
        except httpx.TransportError:
            pass  # not listening yet
        time.sleep(0.2)
    raise SystemExit(f"the server was not ready within {START_S} s")


def fill(url: str, key: str, folder: str, scratch: Path) -> None:
    """Uploads the deltas and defines the task."""
    from transformers import AutoConfig

    from deltas.backbones import describe
    from deltas.formats import native

    spec = describe(AutoConfig.from_pretrained(folder), "benchmark")
    with httpx.Client(base_url=url, headers={"authorization": f"Bearer {key}"}, timeout=300) as http:
        for i in range(DELTAS):
            path = scratch / "delta.safetensors"
            native.save(make_delta(spec, KINDS[i % len(KINDS)], i), path)
            files = {"file": (path.name, path.read_bytes())}
            http.post("/v1/deltas", data={"name": name(i)}, files=files).raise_for_status()
        task = {"name": TASK, "kind": "generate", "model": name(0), "template": "Shorten: {text}\n"}
        http.post("/v1/tasks", json=task).raise_for_status()


def name(i: int) -> str:
    return f"{KINDS[i % len(KINDS)]}-{i}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--rate", type=float, default=2.0)
    parser.add_argument("--requests", type=int, default=60)
    parser.add_argument("--prompt", default="32:128", help="tokens, as --prompt-tokens of deltaserve bench")
    parser.add_argument("--new", default="16:48", help="tokens, as --new-tokens of deltaserve bench")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument(
        "--folder", default=None, help="backbone folder (default: SmolLM2 from the demo extra)"
    )
    parser.add_argument("--json", type=Path, default=None)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as given:
        scratch = Path(given)
        folder = backbone_folder(args.folder, scratch)
        data, output = scratch / "data", scratch / "output"
        start = ["serve", "--port", "0", "--data-dir", str(data), "--backbone", folder]
        start += ["--dtype", args.dtype, "--threads", str(args.threads)]
        with output.open("wb") as sink:
            server = subprocess.Popen(command(*start), stdout=sink, stderr=subprocess.STDOUT)
        try:
            url = wait_for(server, output)
            key = (data / "admin.key").read_text().strip()
            fill(url, key, folder, scratch)
            backbone = Path(folder).name
            models = ",".join([*map(name, range(DELTAS)), backbone])
            load = ["bench", "--url", url, "--key", key, "--model", models, "--task", TASK]
            load += ["--endpoint", "completions,chat", "--popularity", "zipf", "--rate", str(args.rate)]
            load += [
                "--requests",
                str(args.requests),
                "--prompt-tokens",
                args.prompt,
                "--new-tokens",
                args.new,
            ]
            load += ["--json", str(args.json)] if args.json else []
            code = subprocess.run(command(*load), check=False).returncode
        finally:
            server.terminate()
            server.wait()
    sys.exit(code)


if __name__ == "__main__":
    main()
