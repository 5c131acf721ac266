"""The oracle table: every case of every library on every architecture, served or with the reason why not.

Four columns of tests hold our answers to the libraries' own (``test_peft_table``, ``test_adapterhub_table``,
``test_opendelta_table``, and ``test_native_table`` for what no library stores). Here they are one list of cells, from
which ``methods_page`` makes the documentation.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from enum import Enum
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from deltas.delta import Delta
from deltas.errors import DeltaError
from deltas.formats import read
from tests.oracle import peft_table, test_adapterhub_table, test_native_table, test_opendelta_table

LIBRARIES = ("PEFT", "AdapterHub", "OpenDelta", "native")
FAMILIES = ("llama", "gpt2", "bert", "roberta", "distilbert", "modernbert", "bart", "t5")

# PEFT's types whose canonical method has another name.
_PEFT_METHODS = {
    "BEFT": "bitfit",
    "CARTRIDGE": "prefix",
    "CPT": "prompt",
    "LN_TUNING": "ln",
    "PREFIX_TUNING": "prefix",
    "PROMPT_TUNING": "prompt",
    "PVERA": "vera",
    "P_TUNING": "prompt",
    "TRAINABLE_TOKENS": "tokens",
}
_PEFT_BESIDE = {
    "ln_tuning_linear": "override",
    "lora_bias_all": "override",
    "lora_bias_only": "override",
    "lora_save_embedding_and_head": "override",
    "lora_save_linear": "override",
    "lora_save_norms": "override",
    "lora_tokens": "tokens",
}

# Architectures that a library has nothing for, and why.
WITHOUT = {
    (
        "AdapterHub",
        "modernbert",
    ): "the library gives the fused q, k, v layer a bias of random numbers, which it does not save",
    ("OpenDelta", "modernbert"): "OpenDelta runs on transformers 4.31, which has no ModernBERT",
}

# Heads come with another method; ``test_peft_export`` has the comparison.
PEFT_HEADS = {"lora_sequence_head": "SEQ_CLS", "lora_token_head": "TOKEN_CLS"}
PEFT_HEADED = ("llama", "gpt2", "bert", "roberta", "distilbert", "modernbert")


class State(Enum):
    """What a cell says."""

    SERVED = "compared with the library's own outputs"
    REFUSED = "the library can, and we refuse it"
    LACKING = "the library itself cannot"
    UNTRIED = "made for other architectures only, where it shows an option rather than another kind of file"


@dataclass(frozen=True, slots=True)
class Cell:
    """One case of a library on one architecture. ``methods`` are the canonical ones that it becomes, here or elsewhere;
    ``reason`` says why it is not served.
    """

    library: str
    case: str
    family: str
    state: State
    methods: tuple[str, ...] = ()
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Refusal:
    """An option of PEFT's that is refused by its name."""

    name: str
    method: str
    field: str
    reason: str


def peft_methods(case: peft_table.Case) -> tuple[str, ...]:
    """The methods that a PEFT case can become: its type's, and what is saved beside it on some architectures."""
    first = _PEFT_METHODS.get(case.kind, case.kind.lower())
    beside = _PEFT_BESIDE.get(case.name)
    return (first,) if beside is None else (first, beside)


def table() -> list[Cell]:
    """All cells. Reads every fixture of AdapterHub and OpenDelta; what needs PEFT to run is taken from its cases."""
    cells = [*_peft(), *_adapterhub(), *_opendelta(), *_native()]
    known: dict[tuple[str, str], dict[str, None]] = {}
    for cell in cells:
        known.setdefault((cell.library, cell.case), {}).update(dict.fromkeys(cell.methods))
    named = [
        cell if cell.methods else replace(cell, methods=tuple(known[cell.library, cell.case]))
        for cell in cells
    ]
    tried = {(cell.library, cell.case, cell.family) for cell in named}
    for (library, case), methods in known.items():
        for family in FAMILIES:
            if (library, case, family) not in tried:
                reason = WITHOUT.get((library, family), "")
                state = State.LACKING if reason else State.UNTRIED
                named.append(Cell(library, case, family, state, tuple(methods), reason))
    return named


def peft_refusals() -> list[Refusal]:
    """The options that are refused by the names of their config's keys; whole types are in the reader's table."""
    found = []
    for refused in peft_table.REFUSED:
        if refused.field == "peft_type":
            continue
        kind = refused.make(peft_table.FAMILIES["llama"]).peft_type
        name = _PEFT_METHODS.get(str(kind.value), str(kind.value).lower())
        found.append(Refusal(refused.name, name, refused.field, refused.reason))
    return found


def _peft() -> Iterator[Cell]:
    for case in peft_table.CASES:
        for family in FAMILIES:
            reason = case.excluded.get(family, "")
            state = State.LACKING if reason else State.SERVED
            yield Cell("PEFT", case.name, family, state, peft_methods(case), reason)
    for name in PEFT_HEADS:
        for family in FAMILIES:
            if family in PEFT_HEADED:
                yield Cell("PEFT", name, family, State.SERVED, ("lora", "head"))
            else:
                reason = "heads of an encoder-decoder are not served"
                yield Cell("PEFT", name, family, State.REFUSED, ("lora", "head"), reason)


def _adapterhub() -> Iterator[Cell]:
    module = test_adapterhub_table
    tables = {family: (index["cases"], index["lacks"]) for family, index in module.INDEX.items()}
    yield from _saved("AdapterHub", tables, module.load)


def _opendelta() -> Iterator[Cell]:
    module = test_opendelta_table

    def load(family: str, case: str, folder: Path) -> Delta:
        files = module.as_safetensors(family, case, folder)
        return read(files, module.runner(family).spec, module.runner(family).weights)

    tables = {
        family: (cases, module.INDEX["lacks"][family]) for family, cases in module.INDEX["cases"].items()
    }
    yield from _saved("OpenDelta", tables, load)


Tables = Mapping[str, tuple[Iterable[str], Mapping[str, str]]]


def _saved(library: str, tables: Tables, load: Callable[[str, str, Path], Delta]) -> Iterator[Cell]:
    """The cells of fixtures: by family, its cases and why others are lacking.

    A gated T5 is a T5: what only it can show counts, what it repeats does not.
    """
    for family, (cases, lacks) in tables.items():
        column = family.removesuffix("_gated")
        plain, gated = set(tables[column][0]), set(tables.get(f"{column}_gated", ((), {}))[0])
        for case in cases:
            if family == column or case not in plain:
                yield _read(library, case, column, partial(load, family, case))
        for case, reason in lacks.items():
            if family == column and case not in gated:
                yield Cell(library, case, family, State.LACKING, reason=_without_error(reason))


def _native() -> Iterator[Cell]:
    for family in FAMILIES:
        for case in test_native_table.NAMES:
            delta, _ = test_native_table.made(family)[case]
            yield Cell("native", case, family, State.SERVED, tuple(delta.methods))


def _read(library: str, case: str, family: str, load: Callable[[Path], Delta]) -> Cell:
    with TemporaryDirectory() as folder:
        try:
            delta = load(Path(folder))
        except DeltaError as error:
            return Cell(library, case, family, State.REFUSED, reason=_plain(str(error)))
    return Cell(library, case, family, State.SERVED, tuple(dict.fromkeys(delta.methods)))


def _plain(message: str) -> str:
    """An error's text without the tensor or site that it happens to be about, and without the list of what is served."""
    within = re.fullmatch(r"'[^']*' \('[^']*': (.*)\)", message)
    text = within[1] if within else re.sub(r"^[\w.]+: ", "", message)
    return re.sub(r"(is not served.*); served: .*$", r"\1", text)


def _without_error(reason: str) -> str:
    """OpenDelta's reasons end with the error that shows them, in parentheses."""
    return re.sub(r" \(\w*(Error|Exception|Interrupt)\b.*\)$", "", reason, flags=re.DOTALL)
