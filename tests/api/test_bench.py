"""``deltaserve bench`` against a real server: every request and token counted, failures by code, Ctrl-C."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.api.command import ROOT, Server, eventually, serving
from tests.encoders import write_encoder
from tests.tiny import KINDS, native_files, write_backbone

COMMAND = [sys.executable, "-c", "from server.cli import main; main()", "bench"]


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A tiny Llama with one delta of each of four kinds."""
    folder = tmp_path_factory.mktemp("decoder")
    backbone = write_backbone(folder / "tiny", positions=512)
    native_file = native_files(backbone, folder / "native")
    flags = ["--backbone", str(backbone), "--dtype", "float32", "--threads", "1"]
    with serving(folder / "data", *flags) as server:
        with server.http() as http:
            for seed, kind in enumerate(KINDS):
                file = ("delta.safetensors", native_file(kind, seed).read_bytes())
                made = http.post("/v1/deltas", data={"name": f"my-{kind}"}, files={"file": file})
                assert made.status_code == 201, made.text
        yield server


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("encoder")
    backbone = write_encoder(folder / "bert-tiny", "bert")
    with serving(
        folder / "data", "--backbone", str(backbone), "--dtype", "float32", "--threads", "1"
    ) as server:
        yield server


def started(server: Server, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*COMMAND, "--url", server.url, "--key", server.key, *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def bench(server: Server, *arguments: str, code: int = 0) -> tuple[str, str]:
    """Runs to its end; what it printed, and its error lines."""
    with started(server, *arguments) as process:
        out, err = process.communicate(timeout=120)
    assert process.returncode == code, out + err
    return out, err


def report(path: Path) -> tuple[dict[str, Any], dict[tuple[str, str], dict[str, Any]]]:
    """The JSON report, and its groups by what they are of."""
    read = json.loads(path.read_text())
    return read, {(group["by"], group["name"]): group for group in read["groups"]}


def counter(server: Server, name: str) -> float:
    """A counter's sum over its labels."""
    with server.http() as http:
        text = http.get("/metrics").text
    return sum(
        float(value) for value in re.findall(rf"^deltaserve_{name}(?:{{.*}})? (\S+)$", text, re.MULTILINE)
    )


def test_closed_loop_counts_what_the_server_counts(decoder: Server, tmp_path: Path) -> None:
    before = [counter(decoder, name) for name in ("prompt_tokens_total", "generated_tokens_total")]
    out, _ = bench(
        decoder,
        *("--concurrency", "6", "--requests", "40", "--warmup", "0", "--popularity", "distinct"),
        *("--prompt-tokens", "8:16", "--new-tokens", "5:9", "--endpoint", "completions,chat"),
        *("--json", str(tmp_path / "report.json")),
    )
    whole, groups = report(tmp_path / "report.json")
    after = [counter(decoder, name) for name in ("prompt_tokens_total", "generated_tokens_total")]
    everything = groups["all", "all"]
    assert [everything["prompt_tokens"], everything["output_tokens"]] == [
        b - a for a, b in zip(before, after, strict=True)
    ]
    assert 40 * 5 <= everything["output_tokens"] <= 40 * 9
    assert (whole["started"], whole["succeeded"], whole["lost"]) == (40, 40, 0)
    assert whole["server"] == {"url": decoder.url, "backbone": "tiny", "kind": "decoder"}
    assert whole["load"]["models"] == [*(f"my-{kind}" for kind in KINDS), "tiny"]
    assert whole["load"]["concurrency"] == 6
    assert whole["sent_late"] is None
    kinds = {name: group["requests"] for (by, name), group in groups.items() if by == "kind"}
    assert kinds == dict.fromkeys([*KINDS, "base"], 8)
    assert sum(groups["endpoint", name]["requests"] for name in ("completions", "chat")) == 40
    for group in groups.values():
        for figure in ("time_to_first_token", "inter_token_latency", "latency"):
            values = group[figure]
            assert 0 <= values["p50"] <= values["p95"] <= values["p99"] <= values["max"] <= whole["seconds"]
        assert group["output_tokens_per_second"] == pytest.approx(group["output_tokens"] / whole["seconds"])
    assert "40 started = 40 succeeded + 0 failed + 0 cancelled" in out
    assert all(re.search(rf"\b{name}\b.*\b8\b", out) for name in [*KINDS, "base"])


def test_open_loop_says_how_late_it_was(decoder: Server, tmp_path: Path) -> None:
    out, _ = bench(
        decoder,
        *("--rate", "50", "--requests", "20", "--warmup", "3", "--popularity", "zipf", "--zipf", "2"),
        *("--prompt-tokens", "4", "--new-tokens", "3", "--json", str(tmp_path / "report.json")),
    )
    whole, groups = report(tmp_path / "report.json")
    assert whole["succeeded"] == 20
    assert groups["all", "all"]["output_tokens"] == 60
    assert whole["warmup"] == {"requests": 3, "failed": 0}
    assert whole["sent_late"]["p50"] >= 0
    assert (whole["load"]["rate"], whole["load"]["concurrency"]) == (50, None)
    assert "Sent after they were due" in out


def test_failures_are_counted_by_their_code(decoder: Server, tmp_path: Path) -> None:
    flags = ["--requests", "9", "--warmup", "0", "--popularity", "distinct", "--new-tokens", "2"]
    path = tmp_path / "report.json"
    out, _ = bench(decoder, "--model", "nobody,tiny,my-lora+my-bitfit", *flags, "--json", str(path))
    whole, groups = report(path)
    assert (whole["started"], whole["succeeded"], whole["failed"], whole["lost"]) == (9, 6, 3, 0)
    assert groups["kind", "unlisted"]["errors"] == {"model_not_found": 3}
    assert groups["kind", "unlisted"]["latency"] is None
    assert groups["kind", "base"]["succeeded"] == groups["kind", "sum"]["succeeded"] == 3
    assert "failed: 3 by model_not_found" in out
    _, err = bench(decoder, "--model", "nobody", *flags, code=1)
    assert "no request succeeded" in err
    bench(decoder, "--model", "tiny", *flags, "--timeout", "0.001", "--json", str(path), code=1)
    assert report(path)[1]["all", "all"]["errors"] == {"timeout": 9}


def test_an_interrupt_prints_what_there_is(decoder: Server, tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    flags = [
        "--warmup",
        "0",
        "--concurrency",
        "4",
        "--seconds",
        "600",
        "--model",
        "tiny",
        "--new-tokens",
        "300",
    ]
    done = counter(decoder, "generated_tokens_total")
    with started(decoder, *flags, "--prompt-tokens", "4", "--json", str(path)) as process:
        eventually(
            lambda: counter(decoder, "generated_tokens_total") > done + 2000, within=100, what="tokens"
        )
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    assert process.returncode == 0, err
    whole, groups = report(path)
    assert whole["interrupted"]
    assert whole["succeeded"] >= 1
    assert whole["cancelled"] >= 1
    assert whole["started"] == whole["succeeded"] + whole["cancelled"]
    assert groups["all", "all"]["output_tokens"] >= 300 * whole["succeeded"]
    assert "interrupted" in out
    eventually(lambda: counter(decoder, "requests_running") == 0, within=30, what="rows freed")


def test_an_encoder_is_asked_for_embeddings(encoder: Server, tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    bench(encoder, "--requests", "5", "--prompt-tokens", "3:6", "--warmup", "0", "--json", str(path))
    whole, groups = report(path)
    assert whole["server"]["kind"] == "encoder"
    assert groups["endpoint", "embeddings"]["succeeded"] == 5
    assert groups["all", "all"]["prompt_tokens"] >= 15
    assert groups["all", "all"]["time_to_first_token"] is None
    _, err = bench(encoder, "--endpoint", "completions", code=1)
    assert "no model of this server has completions: its backbone is of kind encoder" in err


@pytest.mark.parametrize(
    ("arguments", "fault"),
    [
        (["--rate", "1", "--concurrency", "2"], "give one of them"),
        (["--popularity", "fair"], "--popularity is one of distinct, uniform"),
        (["--prompt-tokens", "9:3"], "--prompt-tokens: '9:3'"),
        (["--endpoint", "speech"], "--endpoint: 'speech' is none of completions"),
        (["--dataset", "nowhere.jsonl"], "--dataset: "),
        (["--task", "nothing"], "404"),
    ],
)
def test_bad_options(decoder: Server, arguments: list[str], fault: str) -> None:
    _, err = bench(decoder, *arguments, code=1)
    assert fault in err
