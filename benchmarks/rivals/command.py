"""What runs a rival's case of mixed decoding, and our LoRAs as files that it reads."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from benchmarks.common import RANK, make_delta


def rival_command(args: argparse.Namespace, case: str, prompts: list[list[int]]) -> list[str]:
    """What runs a rival's case, of ``mixed_decode``'s arguments: see benchmarks/rivals/__init__.py."""
    who, _, what = case.partition(" ")
    names = ("folder", "dtype", "device", "new", "threads", "scratch")
    asked = {name: getattr(args, name) for name in names}
    asked |= {"what": what, "prompts": prompts, "repeat": 1}
    if who in ("generate", "peft"):
        return [sys.executable, "-m", "benchmarks.rivals.hugging_face", json.dumps(asked)]
    asked["loras"] = [] if what == "base" else lora_folders(args, int(what.split()[0]))
    if who == "vllm":
        asked["rank"] = RANK
        script = Path(__file__).with_name("vllm_cpu.py")
        return [args.vllm_python, str(script), json.dumps(asked)]
    config = json.loads((Path(args.folder) / "config.json").read_text())
    asked |= {
        "llama_server": args.llama_server,
        "gguf": str(args.gguf),
        "layers": config["num_hidden_layers"],
    }
    return [sys.executable, "-m", "benchmarks.rivals.llama_server", json.dumps(asked)]


def lora_folders(args: argparse.Namespace, count: int) -> list[str]:
    """Our own first ``count`` LoRAs as PEFT saves them, in the scratch folder."""
    from transformers import AutoConfig

    from deltas.backbones import describe
    from deltas.formats import peft_writer

    folders = [Path(args.scratch) / f"lora{i}" for i in range(count)]
    spec = describe(AutoConfig.from_pretrained(args.folder), "benchmark")
    for i, folder in enumerate(folders):
        if not folder.exists():
            folder.mkdir()
            peft_writer.save(make_delta(spec, "lora", i), spec, folder)
    return [str(folder) for folder in folders]
