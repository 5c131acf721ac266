"""The native format: one safetensors file, every method's own.

Tensors are named ``<component index>/<tensor name>``; the file's metadata has one key, ``deltaserve``, whose
value is a JSON object ``{"version": 1, "components": [{"method", "config"}], "digest"}``. The digest may be
missing in an upload; where it is present it must be right. The bytes depend on the canonical content only.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from deltas.delta import Delta
from deltas.errors import InvalidDelta, UnsupportedDelta
from deltas.formats.files import DeltaFiles
from deltas.formats.header import Header, parse_json, shown
from deltas.formats.plan import Plan, PlannedComponent, assemble, printable, refuse_unknown
from deltas.sites import BackboneSpec

WEIGHTS = "delta.safetensors"
METADATA = "deltaserve"
VERSION = 1
MAX_COMPONENTS = 16
_KEY = re.compile(r"(?P<index>0|[1-9][0-9]?)/(?P<name>.+)")


def save(delta: Delta, path: Path) -> None:
    """Write ``delta`` to ``path``. The same content gives the same bytes; its origin is not written."""
    manifest = json.loads(delta.manifest()) | {"version": VERSION, "digest": delta.digest}
    text = json.dumps(manifest, sort_keys=True, separators=(",", ":"))
    owned: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, tensor in delta.named_tensors():
        whole = tensor.contiguous()
        storage = whole.untyped_storage()
        if storage.data_ptr() in storages or storage.nbytes() != whole.numel() * whole.element_size():
            whole = whole.clone()  # the library wants every tensor alone in its storage
        storages.add(whole.untyped_storage().data_ptr())
        owned[name] = whole
    save_file(owned, path, {METADATA: text})


def load(path: Path) -> Delta:
    """Read a file that :func:`save` wrote, and verify its digest. No backbone is needed.

    Raises :class:`InvalidDelta` for anything damaged.
    """
    files = DeltaFiles({WEIGHTS: path})
    header = files.header(WEIGHTS)
    planned = _plan(header)
    delta = assemble(planned, [part.config for part in planned.components], files)
    stated = manifest(header).get("digest")
    if stated is None:
        raise InvalidDelta(f"{WEIGHTS} states no digest", field="digest")
    verify(delta, stated)
    return delta


def plan(files: DeltaFiles, _spec: BackboneSpec) -> Plan:
    """What to load. Raises :class:`InvalidDelta` or :class:`UnsupportedDelta`."""
    return _plan(files.header(WEIGHTS))


def verify(delta: Delta, stated: object) -> None:
    """Refuse a delta whose file states another digest."""
    if stated != delta.digest:
        raise InvalidDelta(
            f"{WEIGHTS} states digest {shown(stated)}, its content has {delta.digest}", field="digest"
        )


def manifest(header: Header) -> dict[str, Any]:
    """The manifest in a native file's header. Raises where it is not one."""
    text = header.metadata.get(METADATA)
    if text is None:
        raise InvalidDelta(f"{WEIGHTS} has no {METADATA!r} in its metadata", field=METADATA)
    found = parse_json(text.encode(), METADATA)
    if found.get("version") != VERSION:
        raise UnsupportedDelta(f"native format version {shown(found.get('version'))}", field="version")
    unknown = sorted(set(found) - {"version", "components", "digest"})
    if unknown:
        raise InvalidDelta(f"{METADATA}: unknown key {shown(unknown[0])}", field=printable(unknown[0]))
    return found


def _plan(header: Header) -> Plan:
    listed = manifest(header).get("components")
    if not isinstance(listed, list) or not 0 < len(listed) <= MAX_COMPONENTS:
        raise InvalidDelta(f"components must be a list of 1 to {MAX_COMPONENTS}", field="components")
    sources: list[dict[str, str]] = [{} for _ in listed]
    unknown: list[str] = []
    for key in header.tensors:
        match = _KEY.fullmatch(key)
        if match is None or int(match["index"]) >= len(listed):
            unknown.append(key)
        else:
            sources[int(match["index"])][match["name"]] = key
    refuse_unknown(unknown, WEIGHTS)
    parts = []
    for entry, source in zip(listed, sources, strict=True):
        if not isinstance(entry, dict) or set(entry) != {"method", "config"}:
            raise InvalidDelta("components: each has exactly a method and a config", field="components")
        if not isinstance(entry["method"], str) or not isinstance(entry["config"], dict):
            raise InvalidDelta("components: a method is a name, its config an object", field="components")
        parts.append(PlannedComponent(entry["method"], entry["config"], source))
    return Plan("native", WEIGHTS, tuple(parts))
