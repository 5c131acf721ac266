"""Configs that want something of their reader: years of matching, a file, a module, an address."""

from __future__ import annotations

import contextlib
import json
import pickle
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deltas.errors import DeltaError
from deltas.formats.opendelta.names import MAX_LENGTH, _compiled
from deltas.formats.patterns import MAX_PATTERN, Patterns
from tests.unit.formats.test_fuzz import in_time
from tests.unit.formats.uploads import Upload, fixture_uploads, peft_uploads

ROOT = Path(__file__).resolve().parents[3]
PATHS = (
    "model.layers.11.self_attn.q_proj",
    "encoder.block.0.layer.1.DenseReluDense.wi_0",
    "a" * 64,
    "a." * 32,
    "0" * 64,
)
MOST_STEPS = 4_000_000

Atom = tuple[str, str]  # one character's pattern, and its quantifier or nothing


def atoms(pattern: str) -> list[Atom]:
    """A pattern of the subset that is read, taken apart; alternatives count as one character here."""
    found = re.findall(r"(\[[^\]]*\]|\([^)]*\)|\\.|.)([*+?]?)", pattern)
    assert "".join(a + q for a, q in found) == pattern
    return [(atom, quantifier) for atom, quantifier in found if atom not in "^$"]


def count_steps(parts: list[Atom], text: str, start: int) -> int:
    """Characters that a backtracking matcher looks at, at worst: every way to share the text among the quantifiers."""
    steps = 0

    def match(index: int, at: int) -> None:
        nonlocal steps
        if index == len(parts) or steps > MOST_STEPS:
            return
        atom, quantifier = parts[index]
        ends = [at] if quantifier in ("*", "?") else []
        stop = at
        while stop < len(text):
            steps += 1
            if not re.fullmatch(atom, text[stop]):
                break
            stop += 1
            ends.append(stop)
            if quantifier in ("", "?"):
                break
        for end in reversed(ends):
            match(index + 1, end)

    match(0, start)
    return steps


def worst(pattern: str, *, everywhere: bool) -> int:
    """The most steps on any of the paths, from every place where a match may begin."""
    parts = atoms(pattern)
    most = 0
    for path in PATHS:
        starts = range(len(path)) if everywhere else [0, *(m.end() for m in re.finditer(r"\.", path))]
        most = max(most, sum(count_steps(parts, path, start) for start in starts))
    return most


ATOMS = st.sampled_from(
    ["a", "0", "q", "_", r"\.", r"\d", "[0-9]", ".", r"\w", "[a-z]", "[A-Za-z0-9_]", "(a|q|self)"]
)
PATTERNS = st.lists(st.tuples(ATOMS, st.sampled_from(["", "", "*", "+", "?"])), min_size=1, max_size=40).map(
    lambda made: "".join(atom + quantifier for atom, quantifier in made)
)


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(PATTERNS)
@pytest.mark.parametrize("reader", ["peft", "opendelta"])
def test_every_expression_that_is_read_takes_few_steps(reader: str, pattern: str) -> None:
    with in_time(pattern):
        if reader == "opendelta":
            if _compiled(pattern) is not None:
                assert worst(pattern, everywhere=True) < MOST_STEPS
            return
        try:
            Patterns("rank_pattern", {pattern: 1})
        except DeltaError:
            return
        assert worst(pattern, everywhere=False) < MOST_STEPS


HOSTILE = (
    "(a+)+$", "(a|a)*b", "(.*)*x", "((a*)*)*", "(?:a?){64}a{64}", ".*.*.*.*.*.*x", r"(\w+\s?)+$", "(a|aa)+$",
    r"(x+x+)+y", "a" * 10_000, "[0-9]" * 51 + "!", "[a-z]" * 51 + "!", "[0-9]*" * 42 + "!", r"\d" * 100 + "!",
    "(a|b)" * 51 + "!", "(" * 200, "[" * 200, "a**", "a{1,100000}", r"(\d*)*", "(?P<n>a)(?P=n)", "(?i:a)*", "\\",
    "(?#", "*", "(?=(a+))a*b",
)  # fmt: skip


def everywhere(value: Any, new: Any) -> Iterator[Any]:
    """The JSON value with each of its strings, in turn, and each list of strings replaced."""
    if isinstance(value, dict):
        for key, inner in value.items():
            for changed in everywhere(inner, new):
                yield {**value, key: changed}
    elif isinstance(value, str) or value is None:
        yield new
    elif isinstance(value, list) and value and all(isinstance(item, str) for item in value):
        yield [new]
        yield new


@pytest.fixture(scope="module")
def uploads() -> list[Upload]:
    """One of each of PEFT's types, and one adapter of each other library; the first is read as it is."""
    return [
        *peft_uploads(("llama",), one_of_each=True),
        *list(fixture_uploads("adapterhub_table", ("llama",)))[::6],
        *list(fixture_uploads("opendelta_table", ("llama",)))[::3],
    ]


@pytest.mark.parametrize("pattern", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_expressions_end(uploads: list[Upload], tmp_path: Path, pattern: str) -> None:
    """Wherever a config holds a string: refused or read, and soon."""
    keys = ("rank_pattern", "alpha_pattern")
    assert max(MAX_LENGTH, MAX_PATTERN) < 10_000
    for upload in (uploads[0], uploads[-1]):
        for file in upload.json_files:
            config = json.loads(upload.files[file])
            variants = [*everywhere(config, pattern)]
            variants += [{**config, key: {pattern: 2}} for key in keys if key in config]
            variants += (
                [{**config, "modified_modules": [f"[r]{pattern}"]}] if "modified_modules" in config else []
            )
            assert len(variants) > 3
            for variant in variants:
                changed = upload.with_file(file, json.dumps(variant).encode())
                with in_time(pattern[:50]), contextlib.suppress(DeltaError):
                    changed.read(tmp_path)


def test_no_path_address_or_module_of_a_config_is_followed(uploads: list[Upload], tmp_path: Path) -> None:
    """In a process of its own, with an audit hook: nothing outside the upload and the backbone is opened or asked for."""
    canary, folder = tmp_path / "canary.json", tmp_path / "uploads"
    canary.write_text('{"peft_type": "LORA"}')
    folder.mkdir()
    wanted = [
        str(canary),
        f"../{canary.name}",
        "http://127.0.0.1:9/x",
        "os.system",
        "hf-internal/tiny",
        "file:///etc/passwd",
    ]
    # keys that libraries follow, whether or not the files had them
    lures = ("tokenizer_name_or_path", "prompt_tuning_init_state_dict_path", "base_model_name_or_path", "auto_mapping",
             "adapters", "shadow_model", "loftq_config", "corda_config", "eva_config", "megatron_core", "revision",
             "backbone_checkpoint_name", "default_checkpoint_base_path", "model_name", "adapter_setup")  # fmt: skip
    made = [uploads[0]]
    for number, upload in enumerate(uploads):
        for file in upload.json_files:
            config = json.loads(upload.files[file])
            for lure in wanted if number == 0 else [wanted[0], wanted[number % len(wanted)]]:
                variants = [{**config, key: lure} for key in lures]
                variants += [{**config, "auto_mapping": {"base_model_class": lure, "parent_library": lure}}]
                variants += everywhere(config, lure)
                made += [upload.with_file(file, json.dumps(variant).encode()) for variant in variants]
    packed = tmp_path / "uploads.pickle"
    packed.write_bytes(pickle.dumps(made))
    command = [sys.executable, "-m", "tests.unit.formats.audited", str(packed), str(folder), str(canary)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-2000:]
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["found"] == []
    assert any(str(canary) in event for event in told["control"]), "the hook sees nothing"
    assert any(event.startswith("socket.") for event in told["control"])
    assert len(made) > 1000
    assert told["accepted"] > 100
    assert list(folder.iterdir()) == []
