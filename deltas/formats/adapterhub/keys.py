"""The tensors of one adapter's file by the library's names, each asked for by what the config promises."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from deltas.errors import InvalidDelta
from deltas.formats.adapterhub import places
from deltas.formats.files import DeltaFiles, listed
from deltas.formats.header import Header
from deltas.sites import BackboneSpec

Shape = tuple[int, ...]


@dataclass(eq=False)
class Keys:
    """One adapter's tensors. ``repeats`` collects keys of the file that stand for a tensor that has another name too."""

    header: Header
    file: str
    name: str
    spec: BackboneSpec
    version: object
    versioned: bool
    inside: str = ""
    repeats: dict[str, str] = field(default_factory=dict)

    @staticmethod
    def of(files: DeltaFiles, file: str, outer: Mapping[str, Any], spec: BackboneSpec) -> Keys:
        """``outer`` is the configuration that names the adapter and the library's version.

        Raises :class:`InvalidDelta` for a name that is none, and what reading the header raises."""
        name, version = outer.get("name"), outer.get("version")
        if not isinstance(name, str) or not name:
            raise InvalidDelta("name must be the adapter's name", field="name")
        header, own = files.header(file), places.prefix(spec)
        inside = own if any(key.startswith(own) for key in header.tensors) else ""
        return Keys(header, file, name, spec, version, versioned="version" in outer, inside=inside)

    def __contains__(self, path: str) -> bool:
        return self.inside + path in self.header.tensors

    def key(self, path: str) -> str:
        """The full key of a tensor that must be there."""
        key = self.inside + path
        if key not in self.header.tensors:
            hint = ""
            if "shared_parameters." in path and self.spec.family == "t5":
                hint = "; AdapterHub's library does not save what the layers of a T5 share"
            raise InvalidDelta(f"{self.file}: missing tensors: {listed([key])}{hint}", field=key)
        return key

    def shape(self, path: str) -> Shape:
        """The shape of a tensor that must be there."""
        return self.header.tensors[self.key(path)].shape

    def repeat(self, path: str, original: str) -> None:
        """Note that the file may have ``original`` a second time as ``path``."""
        if path in self:
            self.repeats[self.inside + path] = self.key(original)
