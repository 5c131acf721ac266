"""``docs/tuning.md`` says what the code does."""

from __future__ import annotations

from tests.tuning_table import PAGE, SECTION, section


def test_the_methods_of_the_page_are_those_of_the_code() -> None:
    found = SECTION.search(PAGE.read_text(encoding="utf-8"))
    assert found is not None
    assert found.group().strip() == section().strip(), "run: python -m tests.tuning_table"
