"""Prefix tuning with the keys and values of all layers in one tensor, or made by a perceptron (Li & Liang 2021).

For each stack s of L layers (AdapterHub's ``self_prefix`` and the like), with w = 2 L kv_heads head_dim: either
``<s>/flat`` ``[n w]``, or ``<s>/tokens`` ``[n, e]``, ``<s>/down`` ``[m, e]``, ``<s>/down_bias`` ``[m]``,
``<s>/up`` ``[w, m]`` and ``<s>/up_bias`` ``[w]``, which give ``up f(down tokens)``: token by token, the keys of the
stack's first layer, its values, the keys of the second and so on.

Config: ``"stacks"``, ``{s: [KV sites in order]}``; ``"activation"``, f; ``"length"``, n; ``"shifts_keys": true`` for
AdapterHub's T5 (:class:`~deltas.patches.KVPrefix`). With ``<KV site>/gate`` ``[1 or 2, hidden]`` and
``<KV site>/gate_bias`` a row takes the keys and the values by a gate. A row's own tokens start at position 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from deltas.delta import Component
from deltas.errors import InvalidDelta, UnsupportedDelta
from deltas.methods import gates
from deltas.methods.base import Outline, Shapes, expect, only_keys
from deltas.methods.bottleneck import ACTIVATIONS, choice
from deltas.methods.per_site import truth, whole
from deltas.ops.inputs import activate
from deltas.patches import KVPrefix, Patch
from deltas.sites import BackboneSpec, SiteKind
from deltas.weights import SiteWeights

_PERCEPTRON = ("tokens", "down", "down_bias", "up", "up_bias")


class PackedPrefix:
    """Keys and values of several layers together."""

    name = "packed_prefix"

    def normalise(self, config: Mapping[str, Any]) -> dict[str, Any]:
        only_keys(config, frozenset({"stacks", "activation", "length", "shifts_keys"}))
        stacks = config.get("stacks")
        if not isinstance(stacks, Mapping) or not stacks:
            raise InvalidDelta("stacks must be an object", field="stacks")
        taken: set[str] = set()
        for sites in stacks.values():
            if not isinstance(sites, list) or not sites or not all(isinstance(site, str) for site in sites):
                raise InvalidDelta("a stack is a list of sites", field="stacks")
            if len(set(sites)) < len(sites) or taken & set(sites):
                raise InvalidDelta("a site may be in one stack, once", field="stacks")
            taken |= set(sites)
        found = {
            "stacks": {str(name): list(sites) for name, sites in sorted(stacks.items())},
            "activation": choice(config, "activation", ACTIVATIONS),
            "length": whole(config.get("length"), "length", 1),
        }
        if truth(config.get("shifts_keys", False), "shifts_keys"):
            found["shifts_keys"] = True
        return found

    def check(self, outline: Outline, spec: BackboneSpec) -> None:
        shapes, config = outline.shapes, outline.config
        if config["length"] >= spec.max_positions:
            raise InvalidDelta(
                f"{config['length']} virtual tokens leave no room in a context of {spec.max_positions}",
                field="length",
            )
        known: set[str] = set()
        for stack, sites in config["stacks"].items():
            wrong = [
                site for site in sites if site not in spec.sites or spec.sites[site].kind is not SiteKind.KV
            ]
            if wrong:
                raise InvalidDelta(f"this backbone has no KV site {wrong[0]!r}", field="stacks")
            refused = next((why for site in sites if (why := spec.sites[site].refused)), "")
            if refused:
                raise UnsupportedDelta(refused, field="stacks")
            known |= _check_stack(
                stack, 2 * len(sites) * spec.kv_heads * spec.head_dim, config["length"], shapes
            )
            for site in sites:
                known |= _check_gate(site, shapes, spec)
        unknown = sorted(set(shapes) - known)
        if unknown:
            raise InvalidDelta(f"{unknown[0]!r} is no tensor of these stacks", field=unknown[0])

    def claims(self, _outline: Outline) -> frozenset[str]:
        return frozenset()

    def rank(self, _outline: Outline) -> int | None:
        return None

    def lower(self, component: Component, weights: SiteWeights) -> list[Patch]:
        spec, config = weights.spec, component.config
        n = config["length"]
        found: dict[str, KVPrefix] = {}
        for stack, sites in config["stacks"].items():
            packed = _packed({k: t.float() for k, t in component.at(stack).items()}, config["activation"])
            states = packed.reshape(n, 2 * len(sites), spec.kv_heads, spec.head_dim).transpose(0, 1)
            for j, site in enumerate(sites):
                own = {name: t.float().contiguous() for name, t in component.at(site).items()}
                found[site] = KVPrefix(
                    site,
                    states[2 * j].contiguous(),
                    states[2 * j + 1].contiguous(),
                    shifts_positions=False,
                    shifts_keys=config.get("shifts_keys", False),
                    gate=gates.gate_of(own),
                )
        return [found[site] for site in spec.sites if site in found]


def _check_stack(stack: str, width: int, length: int, shapes: Shapes) -> set[str]:
    """Refuses a stack's tensors if they do not fit; returns their names."""
    flat = f"{stack}/flat"
    if flat in shapes:
        expect(flat, shapes[flat], (length * width,))
        return {flat}
    names = [f"{stack}/{name}" for name in _PERCEPTRON]
    missing = [name for name in names if name not in shapes]
    if missing:
        raise InvalidDelta(f"missing tensors: {', '.join(missing)}", field=missing[0])
    tokens, down, down_bias, up, up_bias = names
    expect(tokens, shapes[tokens], (length, 0))
    expect(down, shapes[down], (0, shapes[tokens][1]))
    expect(down_bias, shapes[down_bias], (shapes[down][0],))
    expect(up, shapes[up], (width, shapes[down][0]))
    expect(up_bias, shapes[up_bias], (width,))
    return set(names)


def _check_gate(site: str, shapes: Shapes, spec: BackboneSpec) -> set[str]:
    gate, bias = f"{site}/gate", f"{site}/gate_bias"
    if gate not in shapes and bias not in shapes:
        return set()
    for name, other in ((gate, bias), (bias, gate)):
        if name not in shapes:
            raise InvalidDelta(f"{other!r} needs {name}", field=name)
    gates.check_gate(site, spec)
    expect(gate, shapes[gate], (2 if shapes[gate] and shapes[gate][0] == 2 else 1, spec.hidden))
    expect(bias, shapes[bias], (shapes[gate][0],))
    return {gate, bias}


def _packed(tensors: Mapping[str, Tensor], activation: str) -> Tensor:
    if "flat" in tensors:
        return tensors["flat"]
    inner = F.linear(tensors["tokens"], tensors["down"], tensors["down_bias"])
    return F.linear(activate(inner, ACTIVATIONS[activation]), tensors["up"], tensors["up_bias"])
