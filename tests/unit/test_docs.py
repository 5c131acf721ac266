"""The documents keep up with the code: settings, commands, flags, links, and the files and tests they name."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from server.api.routes import (
    deltas,
    encode,
    files,
    fine_tuning,
    generate,
    health,
    metrics,
    models,
    tasks,
    tenants,
    tokenize,
)
from server.cli import app
from server.config import ENV_PREFIX, Settings

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TOPS = ("server/", "deltas/", "deploy/", "tests/", "benchmarks/", "docs/")

_FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_INLINE = re.compile(r"`([^`\n]+)`")
_LINK = re.compile(r"\]\(([^)\s]+)\)")

every_document = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)


def settings_table() -> str:
    """The table in docs/operations.md, as it must be."""
    lines = ["| flag | variable | default | meaning |", "|---|---|---|---|"]
    for name, field in Settings.model_fields.items():
        default = "" if field.default is None else f"`{field.default}`"
        if name.endswith("_bytes") and field.default:
            default += f" ({field.default >> 30} GiB)"
        flag, variable = f"`--{name.replace('_', '-')}`", f"`{ENV_PREFIX}{name.upper()}`"
        lines.append(f"| {flag} | {variable} | {default} | {field.description} |")
    return "\n".join(lines)


def shell_lines(text: str) -> Iterator[str]:
    """The commands in a document: lines of its sh blocks (without what a here-document holds) and inline code."""
    for language, block in _FENCED.findall(text):
        end = ""
        for line in block.replace("\\\n", " ").splitlines() if language == "sh" else ():
            if end:
                end = "" if line == end else end
                continue
            yield line
            if found := re.search(r"<<'(\w+)'", line):
                end = found[1]
    yield from _INLINE.findall(_FENCED.sub("", text))


def invocations(text: str) -> Iterator[list[str]]:
    """Each use of ``deltaserve`` in a document, as its arguments."""
    for line in shell_lines(text):
        for part in re.split(r"[|;&]", line):
            try:
                words = shlex.split(part, comments=True)
            except ValueError:  # half of a quoted text
                continue
            if words and words[0].rpartition("/")[2] == "deltaserve":
                yield words[1:]


def check_invocation(arguments: list[str]) -> None:
    """Fail where a command or a flag does not exist."""
    command: Any = typer.main.get_command(app)
    words = [word for word in arguments if not word.startswith("-")]
    while words and hasattr(command, "commands") and re.fullmatch(r"[a-z]+", words[0]):
        assert words[0] in command.commands, f"no command {words[0]!r} in {arguments}"
        command = command.commands[words.pop(0)]
    known = {"--help"} | {
        name for option in command.params for name in (*option.opts, *option.secondary_opts)
    }
    for word in arguments:
        flag = word.partition("=")[0]
        assert not flag.startswith("-") or flag in known, f"no flag {flag!r} in {arguments}"


def test_the_settings_table_is_the_code_s() -> None:
    text = (ROOT / "docs" / "operations.md").read_text()
    assert settings_table() in text, f"docs/operations.md must hold this table:\n{settings_table()}"


def test_the_readme_s_commands_are_found() -> None:
    found = [" ".join(words[:2]) for words in invocations((ROOT / "README.md").read_text())]
    assert {"delta push", "delta alias", "tenant create"} <= set(found)


def test_a_wrong_command_or_flag_is_noticed() -> None:
    for arguments in (["delta", "pull"], ["delta", "push", "x", "--nmae=y"], ["--port", "1"]):
        with pytest.raises(AssertionError):
            check_invocation(arguments)


def test_the_reference_has_every_route_and_no_other() -> None:
    modules = (
        deltas,
        encode,
        files,
        fine_tuning,
        generate,
        health,
        metrics,
        models,
        tasks,
        tenants,
        tokenize,
    )
    routers = [module.router for module in modules]
    served = {
        (method, route.path) for router in routers for route in router.routes for method in route.methods
    }
    code = " ".join(_INLINE.findall(_FENCED.sub("", (ROOT / "docs" / "api.md").read_text())))
    named = set(re.findall(r"(GET|POST|PUT|PATCH|DELETE) (/\S+)", code))
    assert {(m, _anonymous(p)) for m, p in named} == {(m, _anonymous(p)) for m, p in served}


def _anonymous(path: str) -> str:
    return re.sub(r"{[^}]*}", "{}", path)


@every_document
def test_commands_and_flags_exist(document: Path) -> None:
    for arguments in invocations(document.read_text()):
        check_invocation(arguments)


@every_document
def test_make_targets_exist(document: Path) -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {line.split()[1] for line in shell_lines(document.read_text()) if re.match(r"make [a-z]+", line)}
    assert named <= targets


@every_document
def test_relative_links_resolve(document: Path) -> None:
    for target in _LINK.findall(_FENCED.sub("", document.read_text())):
        if not re.match(r"[a-z]+:|#", target):
            assert (document.parent / target.partition("#")[0]).exists(), target


@every_document
def test_files_and_tests_named_exist(document: Path) -> None:
    for code in _INLINE.findall(_FENCED.sub("", document.read_text())):
        path, _, test = code.partition("::")
        if path.startswith(TOPS) and re.fullmatch(r"[\w./-]+", path):
            assert (ROOT / path).exists(), code
            assert not test or f"def {test}(" in (ROOT / path).read_text(), code
