"""A delta: what tuning produced, in the library's own canonical form.

A delta is a list of components, one per method used. A component has a method's name, a small JSON config and
tensors named ``<site>/<parameter>`` (or just ``<parameter>`` where no site is meant, as for a soft prompt).
Readers in ``formats/`` bring every library's files into this form; ``methods/`` lowers it to patches.

The *digest* is over this canonical content, so the same tensors from a ``.bin``, a ``.safetensors`` or an archive
are the same delta. It names the delta everywhere: in the blob store, in every cache key, in answers.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Component:
    """One method's share of a delta. ``config`` is JSON; ``tensors`` are float tensors on the CPU."""

    method: str
    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]

    def sites(self) -> list[str]:
        """The sites that have tensors here, sorted."""
        return sorted({name.rsplit("/", 1)[0] for name in self.tensors if "/" in name})

    def at(self, site: str) -> dict[str, Tensor]:
        """The tensors of one site, by parameter name."""
        return dict(self._by_site.get(site, {}))

    @cached_property
    def _by_site(self) -> dict[str, dict[str, Tensor]]:
        """Looked up once for each site of a delta that is being loaded: going through all names each time is slow."""
        found: dict[str, dict[str, Tensor]] = {}
        for name, tensor in self.tensors.items():
            at = name.find("/")
            while at >= 0:
                found.setdefault(name[:at], {})[name[at + 1 :]] = tensor
                at = name.find("/", at + 1)
        return found


@dataclass(frozen=True, eq=False)
class Delta:
    """Components in the order in which they apply, and where they came from.

    ``format`` (``peft``, ``adapterhub``, ``native``) is provenance: not part of the digest.
    """

    components: tuple[Component, ...]
    format: str = "native"
    metadata: Mapping[str, str] = field(default_factory=dict)

    @property
    def methods(self) -> list[str]:
        return [component.method for component in self.components]

    @property
    def parameters(self) -> int:
        """How many numbers the delta holds."""
        return sum(t.numel() for _, t in self.named_tensors())

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for _, t in self.named_tensors())

    def named_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """``<component index>/<tensor name>`` and tensor, sorted by name: the canonical order."""
        named = {
            f"{index}/{name}": tensor
            for index, component in enumerate(self.components)
            for name, tensor in component.tensors.items()
        }
        yield from sorted(named.items())

    def manifest(self) -> str:
        """Canonical JSON of everything but the tensors' values."""
        components = [{"method": c.method, "config": dict(c.config)} for c in self.components]
        return json.dumps({"components": components}, sort_keys=True, separators=(",", ":"))

    @cached_property
    def digest(self) -> str:
        """Lower-case hexadecimal sha256 of the manifest and of every tensor's name, dtype, shape and bytes."""
        sha = hashlib.sha256()
        sha.update(self.manifest().encode())
        for name, tensor in self.named_tensors():
            sha.update(f"\n{name}|{str(tensor.dtype)[6:]}|{list(tensor.shape)}\n".encode())
            sha.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return sha.hexdigest()
