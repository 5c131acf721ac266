"""A few stored numbers may stand for whole matrices: lowering is bounded."""

from __future__ import annotations

import pytest
from transformers import AutoConfig

from deltas import methods
from deltas.backbones import describe
from deltas.errors import UnsupportedDelta
from deltas.methods import per_site
from deltas.weights import FrozenTensors
from tests.deltas_of_every_kind import make
from tests.oracle.padded import BACKBONES

FOLDER = BACKBONES / "llama"


@pytest.mark.parametrize("method", ["fourierft", "randlora", "hira", "lokr"])
def test_what_would_fill_the_memory_is_refused(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = describe(AutoConfig.from_pretrained(FOLDER), "test")
    delta, weights = make(spec, method, 1), FrozenTensors(FOLDER)
    assert methods.lower(delta, spec, weights)
    monkeypatch.setattr(per_site, "MAX_LOWERED", 100)
    with pytest.raises(UnsupportedDelta, match="holds more than 100 numbers"):
        methods.lower(delta, spec, weights)
