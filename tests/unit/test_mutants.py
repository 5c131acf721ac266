"""Deliberate breaks (``make mutants``) must find their place in the code: one that moved would break nothing."""

from __future__ import annotations

from collections import Counter

from tests.mutants import MUTANTS, ROOT


def test_every_mutant_finds_its_text_once() -> None:
    found = {(m.file, m.old): (ROOT / m.file).read_text().count(m.old) for m in MUTANTS}
    assert {place for place, count in found.items() if count != 1} == set()
    assert Counter(m.old == m.new for m in MUTANTS) == {False: len(MUTANTS)}


def test_every_mutant_names_tests_that_exist() -> None:
    assert {
        test for m in MUTANTS for test in m.tests if not (ROOT / test.partition("::")[0]).exists()
    } == set()
