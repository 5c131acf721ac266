"""What the tests of tasks share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from torch import Tensor

from deltas.delta import Delta
from tests.api.command import Server, serving
from tests.api.encoders import headed, pushed, save
from tests.deltas_of_every_kind import make
from tests.encoders import SPECIAL, write_encoder
from tests.oracle.padded import PaddedRow, PaddedRunner


def define(http: httpx.Client, name: str, kind: str, model: str, **more: Any) -> dict[str, Any]:
    """A task; its object."""
    response = http.post("/v1/tasks", json={"name": name, "kind": kind, "model": model} | more)
    assert response.status_code in (200, 201), response.text
    found: dict[str, Any] = response.json()
    return found


def infer(http: httpx.Client, name: str, *inputs: Any, **parameters: Any) -> list[dict[str, Any]]:
    """A call's outputs, one for each input."""
    response = http.post(f"/v1/tasks/{name}/infer", json={"inputs": [*inputs], "parameters": parameters})
    assert response.status_code == 200, response.text
    found: list[dict[str, Any]] = response.json()["outputs"]
    assert len(found) == len(inputs)
    return found


@dataclass(frozen=True)
class TinyBert:
    """The server, its backbone, and the deltas that it has, by name; ``runner`` is the same model, padded."""

    server: Server
    folder: Path
    runner: PaddedRunner
    deltas: dict[str, Delta]

    def wanted(self, name: str, ids: list[int]) -> Tensor:
        """What the delta's head makes of a row."""
        return self.runner.classes([PaddedRow(ids, self.runner.place(self.deltas[name]))])[0]


@contextmanager
def tiny_bert(folder: Path) -> Iterator[TinyBert]:
    """A server over a tiny BERT, with a delta for every way in which tasks use one."""
    backbone = write_encoder(folder / "bert-tiny", "bert")
    runner = PaddedRunner("bert")
    spec = runner.spec
    deltas = {
        "two": headed(make(spec, "lora", 1), 2, 32),
        "five": headed(make(spec, "bottleneck", 2), 5, 32, pooling="first"),
        "many": headed(make(spec, "bitfit", 3), 151, 32),
        "value": headed(make(spec, "ia3", 4), 1, 32, "regress"),
        "tags": headed(make(spec, "lora", 5), 3, 32, "tag", "none"),
        "body": make(spec, "lora", 6),
    }
    flags = ("--backbone", str(backbone), "--dtype", "float32", "--threads", "1")
    with serving(folder / "data", *flags) as server, server.http() as http:
        for name, delta in deltas.items():
            pushed(http, name, save(folder, name, delta))
        yield TinyBert(server, backbone, runner, deltas)


def row(*words: int) -> list[int]:
    """A text's token ids."""
    return [SPECIAL["[CLS]"], *words, SPECIAL["[SEP]"]]
