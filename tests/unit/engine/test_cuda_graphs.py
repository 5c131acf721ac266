"""Decode steps through static buffers: what a graph replays gives what a pass of its own gives.

The graph is one that calls its body again, on whatever the buffers hold by then; the kernels run in Triton's
interpreter where there is no GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from deltas.bank import PackedDelta
from deltas.ops.triton_kernels import INTERPRETED
from server.engine.cuda_graphs import DecodeGraphs
from server.engine.runner import Runner
from tests import deltas_of_every_kind as every
from tests.oracle.rows import Row, generate, make_runner, place, same
from tests.unit.backbones import tiny


class Recorded:
    """A graph whose capture records a call, and whose replay makes it again and keeps the result where it was."""

    made = 0
    replays = 0

    def capture(self, body: Callable[[], Tensor]) -> Tensor:
        type(self).made += 1
        self._body, self._out = body, body()
        self._out.fill_(float("nan"))  # a capture computes nothing
        return self._out

    def replay(self) -> None:
        type(self).replays += 1
        self._out.copy_(self._body())


@pytest.fixture(autouse=True)
def counts() -> None:
    Recorded.made = Recorded.replays = 0


def graphed_runner(folder: Path, *, paged: bool = False) -> Runner:
    where = torch.device("cpu" if INTERPRETED else "cuda")
    return make_runner(
        folder, torch.float32, "triton", tiny.POSITIONS, paged=paged, graph=Recorded, device=where
    )


def usual_runner(folder: Path) -> Runner:
    """On the CPU, in slots, without graphs, by the C kernels where there are any."""
    return make_runner(folder, torch.float32, capacity=tiny.POSITIONS)


def rows_of(runner: Runner, kinds: list[str], seed: int = 5) -> list[Row]:
    spec = runner.backbone.spec
    placed: dict[str, PackedDelta] = {
        kind: place(runner, every.make(spec, kind, seed)) for kind in dict.fromkeys(kinds) if kind
    }
    return [Row([3 + i, 5, 7][: 1 + i % 3], placed.get(kind), kind) for i, kind in enumerate(kinds)]


def compare(mine: list[Row], wanted: list[Row]) -> None:
    for a, b in zip(mine, wanted, strict=True):
        assert a.tokens == b.tokens, a.name
        assert all(same(x.cpu(), y) < 1e-5 for x, y in zip(a.logits, b.logits, strict=True)), a.name


@pytest.mark.parametrize(("name", "paged"), [("qwen3", True), ("mistral", False)])
def test_graphs_give_what_passes_give(name: str, paged: bool, tmp_path: Path) -> None:
    """Rows of mixed kinds and of none, three of which fill up to four; the window of one of the backbones."""
    folder = tiny.save(name, tmp_path)
    usual, graphed = usual_runner(folder), graphed_runner(folder, paged=paged)
    for kinds in (["lora", "bottleneck", ""], ["prefix", "bitfit", "prompt"]):
        pair = [rows_of(runner, kinds) for runner in (usual, graphed)]
        for runner, rows in zip((usual, graphed), pair, strict=True):
            generate(runner, rows, 3)
        compare(pair[1], pair[0])
    assert (Recorded.made, Recorded.replays) == (2, 2 * 2)  # every step but the first of each


def test_a_graph_serves_other_deltas_of_its_shape(tmp_path: Path) -> None:
    folder = tiny.save("qwen3", tmp_path)
    usual, graphed = usual_runner(folder), graphed_runner(folder)
    made = []
    for seed in (5, 6, 5):
        pair = []
        for runner in (usual, graphed):
            rows = rows_of(runner, ["bitfit", ""], seed)
            generate(runner, rows, 2)
            pair.append(rows)
            for row in rows:
                if row.delta is not None:
                    runner.forget(row.delta)
        compare(pair[1], pair[0])
        made.append(Recorded.made)
    assert made[2] == made[1]


def test_what_no_graph_holds_goes_the_usual_way(tmp_path: Path) -> None:
    folder = tiny.save("qwen3", tmp_path)
    usual, graphed = usual_runner(folder), graphed_runner(folder)
    pair = [rows_of(runner, ["oft", ""]) for runner in (usual, graphed)]  # its linears read another input
    for runner, rows in zip((usual, graphed), pair, strict=True):
        generate(runner, rows, 2)
    compare(pair[1], pair[0])
    assert Recorded.replays == 0
    assert graphed.graphs is not None
    graphed.graphs.rows = (1, 2)
    generate(graphed, rows_of(graphed, ["", "", ""]), 2)
    assert Recorded.replays == 0


def test_the_least_recently_used_graph_goes(tmp_path: Path) -> None:
    graphed = graphed_runner(tiny.save("qwen3", tmp_path))
    assert isinstance(graphed.graphs, DecodeGraphs)
    graphed.graphs.most = 1
    for count in (1, 2, 1):
        generate(graphed, rows_of(graphed, [""] * count), 2)
    assert Recorded.made == 3
