"""Canonical tensors that are made of others: shapes are known from headers, and are what the tensors then have."""

from __future__ import annotations

import pytest
import torch

from deltas.errors import InvalidDelta, UnsupportedDelta
from deltas.formats.header import Header, TensorInfo
from deltas.formats.sources import Derived, Given, Own, Source, Zeros, info_of, name_of, tensor_of

WHOLE = torch.arange(24.0).reshape(4, 6)
HEADER = Header({"a": TensorInfo(torch.float32, (4, 6)), "v": TensorInfo(torch.float16, (6,))}, {})
LOADED = {"a": WHOLE, "v": torch.arange(6).half()}


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("a", WHOLE),
        (Derived("a"), WHOLE),
        (Derived("a", rows=(1, 3)), WHOLE[1:3]),
        (Derived("a", columns=(4, 6)), WHOLE[:, 4:]),
        (Derived("v", columns=(2, 3)), torch.tensor([2.0]).half()),
        (Derived("a", rows=(0, 2), columns=(1, 3), transposed=True), WHOLE[:2, 1:3].T),
        (Derived("a", shape=(-1,)), WHOLE.flatten()),
        (Derived("a", shape=(2, -1, 3)), WHOLE.reshape(2, 4, 3)),
        (Derived("a", transposed=True, shape=(24,)), WHOLE.T.flatten()),
        (Derived("a", blocks=2), torch.block_diag(WHOLE[:2], WHOLE[2:])),
        (Given((3, 1)), torch.tensor([3, 1])),
        (Zeros((2, 1)), torch.zeros(2, 1)),
    ],
)
def test_what_a_source_gives_is_what_it_announced(source: Source, expected: torch.Tensor) -> None:
    info, tensor = info_of(source, HEADER), tensor_of(source, LOADED)
    assert (info.shape, info.dtype) == (tuple(tensor.shape), tensor.dtype)
    assert torch.equal(tensor, expected)
    assert tensor.is_contiguous()
    if isinstance(source, Derived):
        assert name_of(source) == source.source
        assert tensor.data_ptr() != LOADED[source.source].data_ptr()


@pytest.mark.parametrize(
    "source",
    [
        Derived("a", rows=(3, 5)),
        Derived("a", rows=(2, 2)),
        Derived("a", rows=(-1, 2)),
        Derived("a", columns=(0, 7)),
        Derived("v", transposed=True),
        Derived("a", shape=(5, -1)),
        Derived("a", shape=(25,)),
        Derived("a", shape=(0, -1)),
        Derived("a", blocks=3),
        Derived("v", blocks=2),
    ],
)
def test_parts_that_are_not_there(source: Derived) -> None:
    with pytest.raises(InvalidDelta) as caught:
        info_of(source, HEADER)
    assert caught.value.field == source.source


def test_the_backbones_own() -> None:
    source = Own("bert.pooler.weight", (4, 6))
    assert name_of(source) is None
    assert info_of(source, HEADER) == TensorInfo(torch.float32, (4, 6))
    for key in ("bert.pooler.weight", "pooler.weight"):
        assert torch.equal(tensor_of(source, {}, {key: WHOLE.bfloat16()}.get), WHOLE)
    for frozen in (None, {"pooler.weight": WHOLE.T}.get, {"weight": WHOLE}.get):
        with pytest.raises(UnsupportedDelta) as caught:
            tensor_of(source, {}, frozen)
        assert caught.value.field == source.key
