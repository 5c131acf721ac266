"""Sums of deltas as users write them in a model's name: ``a+b``, ``a*0.7+tenant/b@3*-0.3``.

    sum    = term *("+" term)
    term   = reference ["*" weight]
    weight = a decimal number without exponent, not zero, from -100 to 100

No reference holds a ``+`` or a ``*``, so the text is read in one way only.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from server.errors import InvalidRequest
from server.store.reference import parse_reference, shown

MOST_TERMS = 8
LARGEST_WEIGHT = 100.0
_WEIGHT = re.compile(r"-?[0-9]{1,3}(?:\.[0-9]{1,30})?")


@dataclass(frozen=True)
class Term:
    """One delta of a sum, by the name a request gives it, and its weight."""

    reference: str
    weight: float = 1.0


def is_sum(model: str) -> bool:
    """Whether the name is a sum, of one weighted term at least."""
    return "+" in model or "*" in model


def parse_sum(model: str) -> list[Term]:
    """The terms in their order. Raises ``InvalidRequest`` naming ``model`` and the bad term."""
    texts = model.split("+")
    if len(texts) > MOST_TERMS:
        raise _invalid(f"a sum has at most {MOST_TERMS} terms, {shown(model)} has {len(texts)}")
    return [_term(text, model) for text in texts]


def _term(text: str, model: str) -> Term:
    if not text:
        raise _invalid(f"a term of {shown(model)} is empty; a sum is written like a+b or a*0.7+b*0.3")
    reference, star, weight = text.partition("*")
    if parse_reference(reference) is None:
        raise _invalid(f"the term {shown(text)} does not begin with a delta's name")
    return Term(reference, _weight(weight, text) if star else 1.0)


def _weight(text: str, term: str) -> float:
    if _WEIGHT.fullmatch(text) is None:
        raise _invalid(f"the term {shown(term)} needs a decimal number like 0.7 or -1.5 after its '*'")
    weight = float(text)
    if weight == 0:
        raise _invalid(f"the weight of the term {shown(term)} is zero: leave the term out")
    if abs(weight) > LARGEST_WEIGHT:
        raise _invalid(f"the weight of the term {shown(term)} is beyond {LARGEST_WEIGHT:g}")
    return weight


def _invalid(message: str) -> InvalidRequest:
    return InvalidRequest(f"Invalid 'model': {message}.", param="model")
