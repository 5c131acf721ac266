"""Inputs of a task's call fit its template's fields, or are refused."""

from __future__ import annotations

import pytest

from server.api.tasks.inputs import values_of
from server.errors import InvalidRequest


def test_values_of_inputs() -> None:
    assert values_of("x", ("text",)) == {"text": "x"}
    assert values_of({"a": "x", "b": "y"}, ("b", "a")) == {"a": "x", "b": "y"}
    for item, message in (
        ("x", "give an object"),
        ("", "give an object"),
        ({"a": "x"}, "lacks the field 'b'"),
        ({"a": "x", "b": ""}, "'b' must be"),
        ({"a": "x", "b": None}, "'b' must be"),
        ({"a": "x", "b": "y", "c": "z"}, "the field 'c'"),
        (["x"], "a text, or an object"),
        (None, "a text, or an object"),
    ):
        with pytest.raises(InvalidRequest, match=message) as caught:
            values_of(item, ("a", "b"))
        assert caught.value.param == "inputs"
