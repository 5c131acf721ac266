"""The results of one run of the benchmarks as one JSON object and as Markdown tables.

    python -m benchmarks.summary FOLDER

reads the JSON that the scripts wrote to the folder and writes ``summary.json`` and ``summary.md`` beside it. Ratios are of
figures of one script's one run.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import machine

SUMMARIES = ("summary.json", "summary.md")

# of W1: what is claimed, the case, the case it is compared with, the ratio that is aimed at
CLAIMS = (
    ("base only, to vLLM with no delta", "ours base", "vllm base", 1.5),
    ("base only, to llama.cpp with no delta", "ours base", "llama.cpp base", 1.0),
    ("32 LoRAs, to our base", "ours 32 loras", "ours base", 0.92),
    ("32 deltas of four kinds, to our base", "ours 32 deltas of four kinds", "ours base", 0.90),
    ("32 LoRAs, to vLLM with no delta", "ours 32 loras", "vllm base", 1.0),
    ("32 LoRAs, to llama.cpp with no delta", "ours 32 loras", "llama.cpp base", 1.0),
    ("8 LoRAs, to vLLM with 8", "ours 8 loras", "vllm 8 loras", 6.0),
    ("8 LoRAs, to llama.cpp with 8", "ours 8 loras", "llama.cpp 8 loras", 6.0),
    ("8 LoRAs, to PEFT's mixed batch of 8", "ours 8 loras", "peft 8 loras", 6.0),
)


def write_summary(folder: Path, names: Sequence[str] | None = None, *, quick: bool = False) -> str:
    """Writes both files; the Markdown. ``names`` are the results to take, where there are any (default: all there are)."""
    if names is None:
        names = sorted(path.stem for path in folder.glob("*.json") if path.name not in SUMMARIES)
    paths = {name: folder / f"{name}.json" for name in names}
    results = {name: json.loads(path.read_text()) for name, path in paths.items() if path.exists()}
    missing = [name for name in names if name not in results]
    (folder / "summary.json").write_text(
        json.dumps({"quick": quick, "missing": missing, "results": results}, indent=1) + "\n"
    )
    parts = [
        "# Benchmarks",
        "Sizes of `--quick`: these figures show that the scripts run, and no more." if quick else "",
    ]
    parts += [
        "Machine: " + "; ".join(sorted({result.get("machine", machine()) for result in results.values()}))
    ]
    parts += [section(name, result) for name, result in results.items()]
    parts += [f"No result: {', '.join(missing)}."] if missing else []
    text = "\n\n".join(part for part in parts if part) + "\n"
    (folder / "summary.md").write_text(text)
    return text


def section(name: str, result: dict[str, Any]) -> str:
    """A heading and the tables of one script's result."""
    if name.startswith("mixed_decode"):
        body = mixed_decode(result["results"])
    elif name == "popularity":
        rows = [
            [group, case, f"{value:.0f}", f"{result['percent_apart'][group]:.1f}"]
            for group, cases in result["results"].items()
            for case, value in cases.items()
        ]
        body = table(["deltas", "popularity", "tokens/s", "group's % apart"], rows)
    elif name == "distinct_deltas":
        base, rival = result["tokens_s"]["0"], result["peft_tokens_s"]
        rows = [
            [count, f"{value:.0f}", f"{value / base:.2f}", f"{rival[count]:.0f}" if count in rival else ""]
            for count, value in result["tokens_s"].items()
        ]
        body = table(["distinct deltas", "tokens/s", "to base", "PEFT, tokens/s"], rows)
    elif name == "load":
        body = load(result["groups"])
    else:
        body = fields(result["results"])
    return f"## {name}\n\n{body}"


def mixed_decode(results: dict[str, dict[str, Any]]) -> str:
    base = results.get("ours base", {}).get("tokens_s")
    rows = [
        [case, f"{r['tokens_s']:.0f}", f"{r['tokens_s'] / base:.2f}" if base else "", f"{r['peak_mb']:.0f}"]
        if "tokens_s" in r
        else [case, str(r["failed"]).replace("|", "/"), "", ""]
        for case, r in results.items()
    ]
    claims = [
        [claim, f"{results[case]['tokens_s'] / results[other]['tokens_s']:.2f}", f"{aim:g}"]
        for claim, case, other, aim in CLAIMS
        if "tokens_s" in results.get(case, {}) and "tokens_s" in results.get(other, {})
    ]
    tables = [table(["case", "tokens/s", "to our base", "peak MB"], rows)]
    return "\n\n".join([*tables, table(["ratio", "measured", "aimed at"], claims)] if claims else tables)


def fields(results: dict[str, dict[str, Any]]) -> str:
    """One row a case, one column for each number that any of them has; lists (of all rounds) stay in the JSON."""
    columns = list(
        dict.fromkeys(
            name for found in results.values() for name, value in found.items() if not isinstance(value, list)
        )
    )
    rows = [[case, *(number(found.get(column)) for column in columns)] for case, found in results.items()]
    return table(["case", *columns], rows)


def load(groups: Sequence[dict[str, Any]]) -> str:
    """What ``deltaserve bench`` wrote of each group of requests."""
    rows = []
    for group in groups:
        times = [group[name] for name in ("time_to_first_token", "inter_token_latency", "latency")]
        shown = [
            " / ".join(f"{1e3 * found[p]:.0f}" for p in ("p50", "p95", "p99")) if found else ""
            for found in times
        ]
        name = group["name"] if group["by"] == "all" else f"{group['by']} {group['name']}"
        rows.append(
            [
                name,
                str(group["requests"]),
                str(group["failed"]),
                f"{group['output_tokens_per_second']:.0f}",
                *shown,
            ]
        )
    heads = [
        "requests",
        "failed",
        "tokens/s",
        "first token, ms, p50 / p95 / p99",
        "inter-token, ms",
        "end to end, ms",
    ]
    return table(["of", *heads], rows)


def number(value: float | None) -> str:
    if value is None:
        return ""
    return str(value) if isinstance(value, int) else f"{value:.4g}"


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


if __name__ == "__main__":
    print(write_summary(Path(sys.argv[1])))
