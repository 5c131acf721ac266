"""``deltaserve bench``: drives a running server and prints what it measured."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from server.bench.drive import Limits, Run, closed_loop, connect, open_loop
from server.bench.plan import PATHS, POPULARITIES, Plan, arrivals
from server.bench.prompts import Lengths, Prompts, read_texts
from server.bench.report import summary
from server.cli.bench_targets import backbone_of, find_targets, prompt_tokens_of
from server.cli.client import DEFAULT_URL, Client, Key, Url, console, fail, find_key

_MEANINGS = "; ".join(f"{name}: {meaning}" for name, meaning in POPULARITIES.items())
_CONCURRENCY = 8  # where none is given; also of the warm-up of an open loop


def command(
    model: Annotated[
        str | None,
        typer.Option(
            help="NAME[,NAME...]. Default: every ready delta that the key lists, then the backbone."
        ),
    ] = None,
    task: Annotated[
        list[str] | None,
        typer.Option(
            help="A task's NAME; may be repeated. Tasks come behind the models of --model, or alone."
        ),
    ] = None,
    endpoint: Annotated[
        str | None,
        typer.Option(
            help=f"NAME[,NAME...] of {', '.join(PATHS)}, mixed in equal parts. Default: completions; for an encoder "
            "classify where a delta has a head, else embeddings."
        ),
    ] = None,
    popularity: Annotated[str, typer.Option(help=f"Of the models. {_MEANINGS}.")] = "uniform",
    zipf: Annotated[float, typer.Option(min=0.0, help="The exponent S of zipf.")] = 1.0,
    rate: Annotated[
        float | None, typer.Option(min=0.001, help="Open loop: requests a second, as a Poisson process.")
    ] = None,
    concurrency: Annotated[
        int | None,
        typer.Option(
            min=1, help=f"Closed loop: requests at a time. Default, without --rate: {_CONCURRENCY}."
        ),
    ] = None,
    requests: Annotated[
        int | None, typer.Option(min=1, help="Requests to send. Default, without --seconds: 100.")
    ] = None,
    seconds: Annotated[
        float | None, typer.Option(min=0.001, help="Send for so long; what was sent is waited for.")
    ] = None,
    warmup: Annotated[int, typer.Option(min=0, help="Requests before that are not counted.")] = 8,
    prompt_tokens: Annotated[
        str, typer.Option(help="N or LOW:HIGH random tokens (words, where a route takes text only).")
    ] = "128",
    new_tokens: Annotated[str, typer.Option(help="N or LOW:HIGH, all of which are generated.")] = "64",
    dataset: Annotated[
        Path | None, typer.Option(help='JSONL of {"prompt": "..."}; its prompts are sent in turn.')
    ] = None,
    seed: Annotated[int, typer.Option(help="The same seed and options ask the same things.")] = 0,
    timeout: Annotated[
        float, typer.Option(min=0.001, help="Seconds until a request counts as failed.")
    ] = 600.0,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the report there too.")] = None,
    url: Url = DEFAULT_URL,
    key: Key = None,
) -> None:
    """Send requests to a running server and print throughput and latencies by kind and endpoint."""
    if rate is not None and concurrency is not None:
        fail("--rate is an open loop and --concurrency a closed one: give one of them")
    if popularity not in POPULARITIES:
        fail(f"--popularity is one of {', '.join(POPULARITIES)}, not '{popularity}'")
    at_once = concurrency or _CONCURRENCY
    if requests is None and seconds is None:
        requests = 100
    lengths, generated = _lengths("--prompt-tokens", prompt_tokens), _lengths("--new-tokens", new_tokens)
    with Client(url, key) as client:
        backbone = backbone_of(client)
        targets = find_targets(client, backbone, _names(model), _names(endpoint), task or [])
        prompts = Prompts(lengths, prompt_tokens_of(client), _texts(dataset))
    plan = Plan(targets, popularity, zipf, prompts, generated, seed)
    warm, run = asyncio.run(
        _drive(
            url.rstrip("/"),
            find_key(key),
            plan,
            rate,
            at_once,
            warmup,
            Limits(requests, seconds, timeout),
        )
    )
    report = {
        "server": {"url": url, "backbone": backbone["id"], "kind": backbone["kind"]},
        "load": {
            "models": [target.model for target in targets],
            "endpoints": sorted({endpoint for target in targets for endpoint in target.endpoints}),
            "popularity": popularity,
            "zipf": zipf if popularity == "zipf" else None,
            "rate": rate,
            "concurrency": at_once if rate is None else None,
            "requests": requests,
            "seconds": seconds,
            "prompt_tokens": str(lengths),
            "new_tokens": str(generated),
            "dataset": None if dataset is None else str(dataset),
            "seed": seed,
        },
        "warmup": {"requests": warm.started, "failed": sum(o.state == "failed" for o in warm.outcomes)},
        **summary(run),
    }
    _print(report)
    if json_file is not None:
        try:
            json_file.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            fail(f"--json: {error}")
    if report["lost"]:
        fail(f"{report['lost']} requests were started and never ended: do not use these figures")
    if not report["succeeded"]:
        fail("no request succeeded")


async def _drive(
    url: str, key: str, plan: Plan, rate: float | None, at_once: int, warmup: int, limits: Limits
) -> tuple[Run, Run]:
    """The warm-up and the measured run; the second is empty where the first was interrupted."""
    async with connect(url, key) as http:
        warm = Run()
        if warmup:
            warm = await closed_loop(
                http,
                plan.requests("warm-up"),
                at_once,
                Limits(warmup, None, limits.timeout),
            )
            if warm.interrupted:
                return warm, Run(interrupted=True)
        if rate is not None:
            return warm, await open_loop(http, plan.requests("measured"), arrivals(rate, plan.seed), limits)
        return warm, await closed_loop(http, plan.requests("measured"), at_once, limits)


def _names(given: str | None) -> list[str]:
    return [name for name in (part.strip() for part in (given or "").split(",")) if name]


def _lengths(option: str, text: str) -> Lengths:
    try:
        return Lengths.parse(text)
    except ValueError as error:
        fail(f"{option}: {error}")


def _texts(dataset: Path | None) -> list[str]:
    if dataset is None:
        return []
    try:
        return read_texts(dataset)
    except (ValueError, OSError) as error:
        fail(f"--dataset: {error}")


def _print(report: dict[str, Any]) -> None:
    table = Table("by", "", box=None)
    for column in (
        "requests",
        "failed",
        "req/s",
        "tokens",
        "tok/s",
        "first token, ms",
        "inter-token, ms",
        "end to end, ms",
    ):
        table.add_column(column, justify="right")
    for group in report["groups"]:
        table.add_row(
            group["by"] if group["by"] != group["name"] else "",
            group["name"],
            str(group["requests"]),
            str(group["failed"]),
            f"{group['requests_per_second']:.2f}",
            str(group["output_tokens"]),
            f"{group['output_tokens_per_second']:.1f}",
            _milliseconds(group["time_to_first_token"]),
            _milliseconds(group["inter_token_latency"]),
            _milliseconds(group["latency"]),
        )
    console.print(table)
    console.print(
        "Times are p50 / p95 / p99: from sending to the first token, between tokens, from sending to the end; "
        "req/s and tok/s (new tokens) are over the whole run."
    )
    console.print(
        f"{report['started']} started = {report['succeeded']} succeeded + {report['failed']} failed + "
        f"{report['cancelled']} cancelled, in {report['seconds']:.2f} s"
        + (", interrupted" if report["interrupted"] else "")
        + f"; before them {report['warmup']['requests']} to warm up, of which {report['warmup']['failed']} failed"
    )
    for code, count in report["groups"][0]["errors"].items():
        console.print(f"failed: {count} by {code}")
    if report["sent_late"] is not None:
        console.print(f"Sent after they were due, ms: {_milliseconds(report['sent_late'])}")


def _milliseconds(values: dict[str, float] | None) -> str:
    if values is None:
        return ""
    return " / ".join(f"{values[name] * 1000:.1f}" for name in ("p50", "p95", "p99"))
