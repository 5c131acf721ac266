"""``docs/methods.md`` is what the oracle table says, and what it teaches works."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import LlamaConfig

from deltas.backbones import describe
from deltas.formats import DeltaFiles, read
from deltas.methods import METHODS
from tests.oracle.methods_page import PAGE, TEMPLATE, page
from tests.oracle.methods_papers import GROUPS, PAPERS
from tests.oracle.table import FAMILIES, LIBRARIES, Cell, State, table

EXAMPLES = re.findall(
    r"^```python\n(.*?)^```$", TEMPLATE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
)
SPEC = describe(
    LlamaConfig(
        hidden_size=576, intermediate_size=64, num_hidden_layers=1, num_attention_heads=9, vocab_size=64
    ),
    "page",
)


@pytest.fixture(scope="module")
def cells() -> list[Cell]:
    return table()


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "run: python -m tests.oracle.methods_page"


def test_every_case_has_a_cell_for_every_architecture(cells: list[Cell]) -> None:
    assert {cell.library for cell in cells} == set(LIBRARIES)
    cases = {(cell.library, cell.case) for cell in cells}
    assert len(cells) == len({(cell.library, cell.case, cell.family) for cell in cells})
    assert len(cells) == len(cases) * len(FAMILIES)


def test_every_empty_cell_says_why(cells: list[Cell]) -> None:
    for cell in cells:
        assert bool(cell.reason) is (cell.state in (State.REFUSED, State.LACKING)), cell
        assert cell.methods or cell.state is not State.SERVED, cell


def test_every_method_is_described_and_served_somewhere(cells: list[Cell]) -> None:
    described = [name for names in GROUPS.values() for name in names]
    assert sorted(described) == sorted(METHODS)
    assert set(PAPERS) <= set(METHODS)
    assert {name for cell in cells if cell.state is State.SERVED for name in cell.methods} == set(METHODS)


@pytest.mark.parametrize(
    ("example", "methods"), list(zip(EXAMPLES, [["bitfit", "prompt"], ["lora"]], strict=True))
)
def test_the_examples_write_deltas(
    example: str, methods: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    exec(example, {})
    assert read(DeltaFiles({"delta.safetensors": tmp_path / "delta.safetensors"}), SPEC).methods == methods


def test_the_digest_is_made_as_the_page_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(EXAMPLES[1], {})
    with safe_open("delta.safetensors", "pt") as file:
        manifest = json.loads(file.metadata()["deltaserve"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    components = {"components": manifest["components"]}
    digest = hashlib.sha256(json.dumps(components, sort_keys=True, separators=(",", ":")).encode())
    for name, tensor in sorted(tensors.items()):
        dtype = str(tensor.dtype).removeprefix("torch.")
        digest.update(f"\n{name}|{dtype}|{list(tensor.shape)}\n".encode())
        digest.update(tensor.view(torch.uint8).numpy().tobytes())
    assert digest.hexdigest() == manifest["digest"]
