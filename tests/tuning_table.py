"""Writes the section "Methods" of ``docs/tuning.md`` from the code: ``python -m tests.tuning_table``."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

from deltas.tuned import ALIASES, TUNABLE
from deltas.tuned.options import Option

PAGE = Path(__file__).resolve().parents[1] / "docs" / "tuning.md"
SECTION = re.compile(r"## Methods\n.*?(?=^## |\Z)", re.DOTALL | re.MULTILINE)

_TEXT = """## Methods

An entry of `methods` is `{"method": NAME, "targets": [...], OPTION: VALUE, ...}`; only the name is needed. What is stored
is a component of the named method ([methods.md](methods.md)); everything begins as the backbone itself, but for masking,
prompts, prefixes and heads. The learning rate is the peak that AdamW takes where the job names none.

`targets` are names of sites (`layers.3.attn.q`), ends of them (`q`, `attn.q`), parts of them (`mlp`, `layers.3`), the
modules' own names (`q_proj`, `query`), or a word: `linears` (also `all-linear`), `norms`, `biases` (linears and norms that
have one in the backbone). A job that classifies, regresses or tags reads hidden states through a head, so nothing of the
backbone's output head can be targeted, and of an encoder-decoder only the encoder.

"""


def section() -> str:
    """The section, from its heading to the next one's blank line."""
    return _TEXT + "\n".join([*_table(), "", *_options()]) + "\n"


def _table() -> Iterator[str]:
    yield "| method | also called | default targets | learning rate | stored as |"
    yield "|---|---|---|---|---|"
    for name, method in TUNABLE.items():
        others = ", ".join(f"`{alias}`" for alias, meant in ALIASES.items() if meant == name)
        yield f"| `{name}` | {others} | {method.where} | {method.learning_rate:g} | `{method.method}` |"


def _options() -> Iterator[str]:
    yield "| method | option | default | meaning |"
    yield "|---|---|---|---|"
    for name, method in TUNABLE.items():
        for option in method.known:
            yield f"| `{name}` | `{option.name}` | {_default(option)} | {option.meaning} |"


def _default(option: Option) -> str:
    return f"`{json.dumps(option.default)}`"


def main() -> None:
    """Put the section in its place, or at the end."""
    text = PAGE.read_text(encoding="utf-8")
    found = SECTION.search(text)
    start, end = found.span() if found else (len(text), len(text))
    follows = "\n" if text[end:] else ""
    PAGE.write_text(text[:start] + section() + follows + text[end:], encoding="utf-8")


if __name__ == "__main__":
    main()
