"""Templates are data: fields and braces, whatever a client writes into either side."""

from __future__ import annotations

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.engine.templates import DEFAULT, Part, Template, parse
from server.errors import InvalidRequest
from server.types import TextPiece


def joined(template: Template, values: dict[str, str]) -> list[str]:
    return ["".join(piece.text for piece in text) for text in template.pieces(values)]


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("plain", [("plain", False)]),
        ("{a}", [("a", True)]),
        ("{a} ? [MASK], {b}.", [("a", True), (" ? [MASK], ", False), ("b", True), (".", False)]),
        ("{a}{b}{a}", [("a", True), ("b", True), ("a", True)]),
        ("{{a}}", [("{a}", False)]),
        ("{{{a}}}", [("{", False), ("a", True), ("}", False)]),
        ('{{"x": "{_y1}"}}', [('{"x": "', False), ("_y1", True), ('"}', False)]),
        ("", []),
    ],
)
def test_parts(text: str, parts: list[tuple[str, bool]]) -> None:
    assert parse(text) == tuple(Part(*part) for part in parts)


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "}",
        "{}",
        "{0}",
        "{a",
        "a}",
        "{a.b}",
        "{a.__class__.__init__.__globals__}",
        "{a[0]}",
        "{a!r}",
        "{a:>1000000000}",
        "{a:{b}}",
        "{ a }",
        "{a b}",
        "{{a}",
        "{a}}",
        "{é}",
        "{a\n}",
        "{" + "a" * 65 + "}",
        "{% for x in y %}",
        "{{ config }} {",
    ],
)
def test_hostile_templates_are_refused_with_the_place(text: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse(text)
    assert caught.value.param == "template"
    assert "character" in caught.value.message


@given(st.text(), st.text())
def test_values_are_never_read_again(one: str, two: str) -> None:
    template = Template.of("{a} and {{{b}}}")
    assert joined(template, {"a": one, "b": two}) == [f"{one} and {{{two}}}"]
    assert template.pieces({"a": one, "b": two}) == [
        [
            TextPiece(one, False),
            TextPiece(" and {", True),
            TextPiece(two, False),
            TextPiece("}", True),
        ]
    ]


@given(st.text(alphabet="{}ab ", max_size=20))
def test_as_python_reads_them_where_it_finds_fields_and_braces_only(text: str) -> None:
    """What is accepted means what ``string.Formatter`` takes it for."""
    try:
        parts = parse(text)
    except InvalidRequest:
        return
    found = "".join(f"<{part.text}>" if part.is_field else part.text for part in parts)
    wanted = "".join(
        literal + (f"<{field}>" if field is not None else "")
        for literal, field, _, _ in string.Formatter().parse(text)
    )
    assert found == wanted


def test_fields_pairs_and_chats() -> None:
    assert Template.of(None) == Template.of(DEFAULT)
    assert Template.of("{b} {a} {b}").fields == ("b", "a")
    pair = Template.of(["{a}", "b {c}"])
    assert (pair.is_pair, pair.fields, pair.roles) == (True, ("a", "c"), ())
    chat = Template.of([{"role": "system", "content": "x"}, {"role": "user", "content": "{a}{{"}])
    assert (chat.is_pair, chat.roles) == (False, ("system", "user"))
    assert chat.messages({"a": "{b}"}) == [
        {"role": "system", "content": "x"},
        {"role": "user", "content": "{b}{"},
    ]
    with pytest.raises(InvalidRequest, match="no field"):
        Template.of("nothing")


def test_literals_change_and_fields_do_not() -> None:
    template = Template.of("a {a} a").with_literals(str.upper)
    assert joined(template, {"a": "a"}) == ["A a A"]
