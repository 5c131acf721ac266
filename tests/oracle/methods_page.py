"""Writes ``docs/methods.md``: ``python -m tests.oracle.methods_page``.

The text is in ``methods_page.template.md``; the tables are made of the oracle table and of the methods' own docstrings.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from transformers import AutoConfig

from deltas import backbones
from deltas.formats import peft, peft_writer
from deltas.methods import METHODS
from deltas.sites import BackboneSpec
from tests.oracle import peft_table
from tests.oracle.methods_papers import GROUPS, PAPERS
from tests.oracle.padded import BACKBONES
from tests.oracle.table import FAMILIES, LIBRARIES, Cell, State, peft_methods, peft_refusals, table

PAGE = Path(__file__).resolve().parents[2] / "docs" / "methods.md"
TEMPLATE = Path(__file__).with_name("methods_page.template.md")
NOTHING = "nothing can be changed"
NAMES = {
    "llama": "Llama",
    "gpt2": "GPT-2",
    "bert": "BERT",
    "roberta": "RoBERTa",
    "distilbert": "DistilBERT",
    "modernbert": "ModernBERT",
    "bart": "BART",
    "t5": "T5",
}
STACKS = ("bart", "t5")


def page() -> str:
    """The whole page."""
    cells = table()
    parts = {
        "matrix": _matrix(cells),
        "sites": _sites(),
        "written": _written(),
        "methods": _methods(cells),
        "refused": _refused(cells),
    }
    text = TEMPLATE.read_text(encoding="utf-8")
    for name, lines in parts.items():
        text = text.replace(f"<!-- {name} -->", "\n".join(lines))
    return text


def _matrix(cells: list[Cell]) -> Iterator[str]:
    """Methods by architectures; a letter for each library whose files are served there."""
    yield "P: PEFT's files, A: AdapterHub's, O: OpenDelta's, N: native, where no library has any. T5: gated or not."
    yield ""
    yield f"| method | {' | '.join(NAMES.values())} |"
    yield "|---|" + "---|" * len(NAMES)
    for name in (name for names in GROUPS.values() for name in names):
        row = []
        for family in FAMILIES:
            served = {
                c.library
                for c in cells
                if c.state is State.SERVED and c.family == family and name in c.methods
            }
            row.append(" ".join(library[0].upper() for library in LIBRARIES if library in served) or "-")
        yield f"| [`{name}`](#{_anchor(name)}) | {' | '.join(row)} |"
    others = [f"`{family}`" for family in backbones.families() if family not in FAMILIES]
    yield ""
    yield f"Other decoders are held to PEFT in `tests/oracle/test_peft_decoders.py`: {', '.join(others)}."


def _methods(cells: list[Cell]) -> Iterator[str]:
    for group, names in GROUPS.items():
        yield f"### {group}"
        yield ""
        for together in _by_module(names):
            yield from _method(together, [c for c in cells if set(c.methods) & set(together)])


def _by_module(names: Iterable[str]) -> list[list[str]]:
    """Methods that are described in one file stand together."""
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(type(METHODS[name]).__module__, []).append(name)
    return list(found.values())


def _method(names: list[str], cells: list[Cell]) -> Iterator[str]:
    yield "#### " + ", ".join(f"`{name}`" for name in names)
    yield ""
    module = type(METHODS[names[0]]).__module__
    yield from _markdown(sys.modules[module].__doc__ or "")
    papers = [paper for name in names for paper in PAPERS.get(name, ())]
    if papers:
        links = (f"[{title}](https://arxiv.org/abs/{number})" for title, number in dict.fromkeys(papers))
        yield f"Papers: {', '.join(links)}."
        yield ""
    kinds = dict.fromkeys(f"`{c.kind}`" for c in peft_table.CASES if set(peft_methods(c)) & set(names))
    libraries = [library for library in LIBRARIES if any(cell.library == library for cell in cells)]
    yield f"| cases | {' | '.join(NAMES.values())} |"
    yield "|---|" + "---|" * len(NAMES)
    for library in libraries:
        title = f"PEFT: {', '.join(kinds)}" if library == "PEFT" else library
        counts = [
            sum(c.library == library and c.family == family and c.state is State.SERVED for c in cells)
            for family in FAMILIES
        ]
        yield f"| {title} | {' | '.join(str(count or '-') for count in counts)} |"
    yield ""
    notes = list(_notes(cells))
    notes += [
        f"- PEFT `{r.name}` refused by its `{r.field}`: {r.reason}."
        for r in peft_refusals()
        if r.method in names
    ]
    if notes:
        yield from notes
        yield ""


def _notes(cells: list[Cell]) -> Iterator[str]:
    """Every cell that is not served, by reason; those that were not tried, by where else they were."""
    reasons: dict[tuple[str, State, str], dict[str, list[str]]] = {}
    for cell in cells:
        if cell.state in (State.REFUSED, State.LACKING):
            by_case = reasons.setdefault((cell.library, cell.state, cell.reason), {})
            by_case.setdefault(cell.case, []).append(cell.family)
    for (library, state, reason), by_case in reasons.items():
        verb = "refused" if state is State.REFUSED else "not made"
        yield f"- {library} {_places(by_case)} {verb}: {reason}."
    made: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    untried = {(c.library, c.case) for c in cells if c.state is State.UNTRIED}
    for library, case in sorted(untried):
        where = [c for c in cells if (c.library, c.case) == (library, case) and c.state is not State.UNTRIED]
        made.setdefault((library, tuple(_in_order(c.family for c in where))), []).append(case)
    for (library, families), cases in made.items():
        yield f"- {library} {_code(cases)} only on {_named(families)}."


def _places(by_case: dict[str, list[str]]) -> str:
    """Cases and where: those in the same places together."""
    grouped: dict[tuple[str, ...], list[str]] = {}
    for case, families in by_case.items():
        grouped.setdefault(tuple(_in_order(families)), []).append(case)
    return "; ".join(f"{_code(cases)} on {_named(families)}" for families, cases in grouped.items())


def _refused(cells: list[Cell]) -> Iterator[str]:
    yield "PEFT's types that are refused by name:"
    yield ""
    for kind, reason in peft.REFUSED.items():
        yield f"- `{kind}`: {reason}."
    yield ""
    yield "Of the other libraries, what becomes no method on any architecture:"
    yield ""
    yield from _notes([cell for cell in cells if not cell.methods])


def _written() -> Iterator[str]:
    written = [name for names in GROUPS.values() for name in names if name in peft_writer.WRITTEN]
    yield f"Methods with a form in PEFT: {_code(written)}."
    yield ""
    yield "Refused, with the component and the reason:"
    yield ""
    for names, reason in peft_writer.REFUSED.items():
        yield f"- {_code(names)}: {reason}."
    yield "- on GPT-2, whose linears are Conv1D, what PEFT has for `torch.nn.Linear` only;"
    yield "- parts of a fused linear, but for LoRA and IA3, which are put together;"
    yield "- where PEFT's config has one value for all modules (often the rank), a delta whose sites differ in it."


def _sites() -> Iterator[str]:
    specs = {
        name: backbones.describe(AutoConfig.from_pretrained(BACKBONES / name), "page") for name in FAMILIES
    }
    flat = {name: _paths(spec) for name, spec in specs.items() if name not in STACKS}
    yield f"| site | kind | {' | '.join(NAMES[name] for name in flat)} |"
    yield "|---|---|" + "---|" * len(flat)
    kinds = {site: kind for paths in flat.values() for site, (kind, _) in paths.items() if kind != NOTHING}
    for site, kind in sorted(kinds.items(), key=lambda item: _rank(item[0])):
        here = [paths.get(site, ("", "-")) for paths in flat.values()]
        row = [NOTHING if own == NOTHING else f"`{path}`" if own else path for own, path in here]
        yield f"| `{site}` | {kind} | {' | '.join(row)} |"
    yield ""
    yield (
        "BART and T5 have two stacks, and `cross` for the attention between them; a gated T5 has `mlp.gate` beside "
        "`mlp.up`."
    )
    yield ""
    yield f"| site | kind | {' | '.join(NAMES[name] for name in STACKS)} |"
    yield "|---|---|" + "---|" * len(STACKS)
    stacks = [_paths(specs[name]) for name in STACKS]
    for site in dict.fromkeys(site for paths in stacks for site in paths):
        here = [paths.get(site, ("", "-")) for paths in stacks]
        kind = next((own for own, _ in here if own and own != NOTHING), NOTHING)
        row = [f"`{path}`" if own == kind else own or path for own, path in here]
        yield f"| `{site}` | {kind} | {' | '.join(row)} |"


def _paths(spec: BackboneSpec) -> dict[str, tuple[str, str]]:
    """Sites, those of the first layer that has them standing for all, with kind and module path."""
    found: dict[str, tuple[str, str]] = {}
    for site in spec.sites.values():
        name = re.sub(r"layers\.\d+", "layers.i", site.name)
        path = re.sub(r"\b(layers|h|layer|block)\.\d+\b", r"\1.i", site.path, count=1)
        found.setdefault(name, (NOTHING if site.refused else str(site.kind), path))
    return found


def _rank(site: str) -> tuple[int, int]:
    """Embeddings, layers, last norm and head, in the order in which a Llama or a GPT-2 has them."""
    order = ("embed", "layers.i.attn", "layers.i.mlp", "norm", "head")
    leaves = ("norm", "qkv", "q", "k", "v", "kv", "o", "gate_up", "gate", "up", "down", "out")
    place = next(index for index, start in enumerate(order) if site.startswith(start))
    leaf = site.rpartition(".")[2]
    return place, leaves.index(leaf) if "layers" in site else len(site)


def _markdown(text: str) -> Iterator[str]:
    """A docstring's paragraphs and lists, one line each, in Markdown."""
    text = re.sub(r":(?:class|func|mod):`~?(?:\w+\.)*(\w+)`", r"`\1`", text).replace("``", "`")
    for paragraph in re.split(r"\n\s*\n", text.strip()):
        for item in re.split(r"\n(?=- )", paragraph) if paragraph.startswith("- ") else [paragraph]:
            yield " ".join(line.strip() for line in item.splitlines())
        yield ""


def _anchor(name: str) -> str:
    """GitHub's, of the heading that ``_method`` makes."""
    together = next(names for group in GROUPS.values() for names in _by_module(group) if name in names)
    return "-".join(together)


def _code(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _named(families: Iterable[str]) -> str:
    return ", ".join(NAMES[family] for family in families)


def _in_order(families: Iterable[str]) -> list[str]:
    wanted = set(families)
    return [family for family in FAMILIES if family in wanted]


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
