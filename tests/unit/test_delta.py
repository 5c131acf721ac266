"""A delta's digest: over the content and all of it, and nothing else."""

from __future__ import annotations

import torch
from torch import Tensor

from deltas.delta import Component, Delta


def one(tensors: dict[str, Tensor] | None = None, scale: float = 1.0, method: str = "lora") -> Delta:
    default = {"a.q/A": torch.arange(6.0).reshape(2, 3), "a.q/B": torch.ones(3, 2)}
    return Delta((Component(method, {"scale": scale}, tensors or default),))


def test_the_digest_is_stable() -> None:
    """A change here makes every stored delta unreadable: think before updating the value."""
    assert one().digest == "c82de1cc9ff8e5d26b81e2dea77a9e0680f3121e3345ba1c76654f9140cafd8c"


def test_the_digest_ignores_order_memory_and_origin() -> None:
    part = one().components[0]
    turned = {name: tensor.T.contiguous().T for name, tensor in reversed(part.tensors.items())}
    other = Delta((Component(part.method, part.config, turned),), "adapterhub", {"name": "x"})
    assert other.digest == one().digest


def test_the_digest_sees_every_part_of_the_content() -> None:
    tensors = dict(one().components[0].tensors)
    a, b = tensors["a.q/A"], tensors["a.q/B"]
    variants = [
        one(),
        one(scale=2.0),
        one(method="bitfit"),
        one(tensors | {"a.q/A": a + torch.eye(2, 3) * 1e-6}),
        one(tensors | {"a.q/A": a.reshape(3, 2)}),
        one(tensors | {"a.q/A": a.half()}),
        one({"a.q/A": a, "a.k/B": b}),
        one({"a.q/A": a}),
        one(tensors | {"a.q/A": torch.where(a == 0, -0.0, a)}),
        Delta(one().components * 2),
    ]
    assert len({delta.digest for delta in variants}) == len(variants)


def test_counts() -> None:
    delta = Delta((*one().components, Component("bitfit", {}, {"norm/beta": torch.ones(5).half()})))
    assert delta.methods == ["lora", "bitfit"]
    assert delta.parameters == 17
    assert delta.nbytes == 12 * 4 + 5 * 2
    assert [name for name, _ in delta.named_tensors()] == ["0/a.q/A", "0/a.q/B", "1/norm/beta"]


def test_sites_of_a_component() -> None:
    part = Component(
        "lora", {}, {"b.q/A": torch.ones(1), "a.q/A": torch.zeros(1), "embeddings": torch.ones(1)}
    )
    assert part.sites() == ["a.q", "b.q"]
    assert part.at("a.q")["A"].item() == 0
    assert list(part.at("a.q")) == ["A"]
