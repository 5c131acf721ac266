"""Sums of deltas as model names: what is read, what is refused, and the digest that names a sum."""

from __future__ import annotations

from decimal import Decimal

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.api.composition import LARGEST_WEIGHT, MOST_TERMS, Term, is_sum, parse_sum
from server.errors import InvalidRequest
from server.types import DeltaPart, DeltaRef

NAMES = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}", fullmatch=True)
TENANTS = st.from_regex(r"[a-z0-9][a-z0-9-]{0,62}", fullmatch=True)
TAGS = st.from_regex(r"[1-9][0-9]{0,9}|[a-z][a-z0-9_.-]{0,63}", fullmatch=True)
WEIGHTS = st.floats(-LARGEST_WEIGHT, LARGEST_WEIGHT, allow_subnormal=False).filter(
    lambda weight: abs(weight) > 1e-12
)


@st.composite
def terms(draw: st.DrawFn) -> Term:
    tenant, name, tag = draw(st.none() | TENANTS), draw(NAMES), draw(st.none() | TAGS)
    start, end = f"{tenant}/" if tenant else "", f"@{tag}" if tag else ""
    return Term(start + name + end, draw(st.just(1.0) | WEIGHTS))


def written(term: Term, *, short: bool) -> str:
    if short and term.weight == 1:
        return term.reference
    return f"{term.reference}*{Decimal(repr(term.weight)):f}"


@given(st.lists(terms(), min_size=1, max_size=MOST_TERMS), st.booleans())
def test_what_is_written_is_read(written_terms: list[Term], short: bool) -> None:
    text = "+".join(written(term, short=short) for term in written_terms)
    assert parse_sum(text) == written_terms
    assert is_sum(text) == (len(written_terms) > 1 or "*" in text)


@given(st.text(alphabet="ab7.+*-@/ e0é\n", max_size=30))
def test_any_text_is_read_in_one_way_or_refused(text: str) -> None:
    try:
        found = parse_sum(text)
    except InvalidRequest:
        return
    assert len(found) == text.count("+") + 1
    for term, part in zip(found, text.split("+"), strict=True):
        assert part.startswith(term.reference)
        assert 0 < abs(term.weight) <= LARGEST_WEIGHT


def test_the_contract_s_examples() -> None:
    assert parse_sum("a+b") == [Term("a"), Term("b")]
    assert parse_sum("a*0.7+b*0.3") == [Term("a", 0.7), Term("b", 0.3)]
    assert parse_sum("t/a@3*0.5+b@live") == [Term("t/a@3", 0.5), Term("b@live")]
    assert parse_sum("a+a*-2") == [Term("a"), Term("a", -2.0)]
    assert parse_sum("a*100+b*-100.000") == [Term("a", 100.0), Term("b", -100.0)]


@pytest.mark.parametrize(
    ("model", "bad"),
    [
        ("a+", "empty"),
        ("+a", "empty"),
        ("+", "empty"),
        ("a++b", "empty"),
        ("a*", "'a*'"),
        ("a*+b", "'a*'"),
        ("*0.5", "'*0.5'"),
        ("0.7*a", "'0.7*a'"),
        ("a*0.5*0.5", "'a*0.5*0.5'"),
        ("a*x", "'a*x'"),
        ("a*nan", "'a*nan'"),
        ("a*inf", "'a*inf'"),
        ("a*1e2", "'a*1e2'"),
        ("a*.5", "'a*.5'"),
        ("a*5.", "'a*5.'"),
        ("a*--5", "'a*--5'"),
        ("a*0x1", "'a*0x1'"),
        ("a*1_0", "'a*1_0'"),
        ("a*٣", "'a*٣'"),
        ("a*1\n", "'a*1\\n'"),
        ("a * 0.5", "'a * 0.5'"),
        ("a + b", "'a '"),
        ("b+a*0", "zero"),
        ("b+a*-0.000", "'a*-0.000'"),
        ("a*100.1", "'a*100.1'"),
        ("a*-101+b", "'a*-101'"),
        ("a*" + "9" * 400, "decimal number"),
        ("a@0+b", "'a@0'"),
        ("a@+b", "'a@'"),
        ("A/b+c", "'A/b'"),
        ("a/b/c*2", "'a/b/c*2'"),
        ("+".join("abcdefghi"), "at most 8"),
    ],
)
def test_refusals_name_the_term(model: str, bad: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_sum(model)
    assert caught.value.param == "model"
    assert bad in caught.value.message
    assert len(caught.value.message) < 400


def test_a_sum_s_digest() -> None:
    a, b = DeltaPart("a" * 64, "/x", 0.7), DeltaPart("b" * 64, "/y", 0.3)
    digest = DeltaRef.of_sum([a, b]).digest
    assert len(digest) == 64
    moved = [DeltaPart(part.digest, "/elsewhere", part.weight) for part in (a, b)]
    assert DeltaRef.of_sum(moved).digest == digest, "where a file lies is not what it holds"
    others = {
        DeltaRef.of_sum(parts).digest
        for parts in (
            [b, a],
            [a],
            [b],
            [a, a],
            [a, DeltaPart("b" * 64, "/y", 0.30000000000000004)],
            [DeltaPart("a" * 64, "/x"), DeltaPart("b" * 64, "/y")],
        )
    }
    assert len(others | {digest}) == 7
    assert DeltaRef.of_sum([DeltaPart("a", "", 2)]) == DeltaRef.of_sum([DeltaPart("a", "", 2.0)])


def test_a_reference_crosses_the_wire_whole() -> None:
    for ref in (DeltaRef("a", "/x"), DeltaRef.of_sum([DeltaPart("a", "/x", 0.1), DeltaPart("b", "/y", 2.0)])):
        assert msgspec.msgpack.decode(msgspec.msgpack.encode(ref), type=DeltaRef) == ref
    assert DeltaRef("a", "/x").summands == (DeltaPart("a", "/x", 1.0),)
