"""Damage for uploads: one random change at a time, with what must come of it.

``Must.REFUSE``: refused, or read as the very same delta. ``Must.KEEP``: read as the very same delta. ``Must.ANSWER``:
refused or read; the file then says something else than before, and says it well.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, auto
from random import Random
from typing import Any

from tests.unit.formats.uploads import Upload, header_of, with_header

SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "U8": 1, "BOOL": 1, "F8_E4M3": 1}
JUNK: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 3, 7, 10**18, 10**400, 1.5, -0.0, 1e308, "", "x", "none", "all", [], [[]], [1],
    ["a"], [None], {}, {"a": 1}, {"a": {"b": []}}, {"": 0}, [[1, 2], [3, 4]], "a" * 5000, "(a+)+$", [{}],
    "../../etc/passwd", "http://example.com/x", "\N{GREEK SMALL LETTER ALPHA}",
)  # fmt: skip


class Must(Enum):
    """What must come of a change."""

    REFUSE = auto()
    KEEP = auto()
    ANSWER = auto()


@dataclass(frozen=True)
class Damage:
    """A changed upload. ``what`` names the change, ``keys`` the tensors, config keys or files that it is about."""

    what: str
    upload: Upload
    must: Must
    keys: tuple[str, ...]


@dataclass
class Tensors:
    """A tensor file taken apart: (name, dtype, shape, bytes) in order, and its metadata."""

    entries: list[tuple[str, Any, list[int], bytes]]
    metadata: Any

    @classmethod
    def of(cls, data: bytes) -> Tensors:
        header, body = header_of(data)
        metadata: Any = header.pop("__metadata__", None)
        made = [
            (name, e["dtype"], e["shape"], body[e["data_offsets"][0] : e["data_offsets"][1]])
            for name, e in header.items()
            if isinstance(e, dict)
        ]
        return cls(made, metadata)

    def pack(self) -> bytes:
        header: dict[str, Any] = {} if self.metadata is None else {"__metadata__": self.metadata}
        at = 0
        for name, dtype, shape, data in self.entries:
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + len(data)]}
            at += len(data)
        return with_header(header, b"".join(entry[3] for entry in self.entries))


def _count(shape: list[int]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total


def bytes_damage(upload: Upload, random: Random) -> Damage:
    """Bytes of a tensor file's header changed, the file cut short or lengthened."""
    file = random.choice(upload.tensor_files)
    data = upload.files[file]
    start = len(data) - len(header_of(data)[1])
    match random.choice(["flip", "cut", "append"]):
        case "flip":
            made = bytearray(data)
            for _ in range(random.randint(1, 3)):
                made[random.randrange(start)] = random.choice([random.randrange(256), *b'0123456789"[]{},:'])
            # a native file's header holds its config too, and a label, say, may be any text
            must = Must.ANSWER if upload.name.startswith("native") else Must.REFUSE
            return Damage("flip", upload.with_file(file, bytes(made)), must, ())
        case "cut":
            end = random.choice(
                [0, 1, 7, 8, 9, start - 1, start, start + 1, len(data) - 1, random.randrange(len(data))]
            )
            return Damage(
                "cut", upload.with_file(file, data[: min(end, len(data) - 1)]), Must.REFUSE, (file,)
            )
        case _:
            extra = bytes(random.choice([1, 4, 1000]))
            return Damage("append", upload.with_file(file, data + extra), Must.REFUSE, (file,))


def header_damage(upload: Upload, random: Random) -> Damage:
    """An entry of a header that no longer agrees with the data."""
    file = random.choice(upload.tensor_files)
    header, body = header_of(upload.files[file])
    key = random.choice([name for name in header if name != "__metadata__"])
    entry: Any = header[key]
    start, end = entry["data_offsets"]
    shape = entry["shape"]
    what = random.choice(["offsets", "dtype", "shape", "left out", "twice"])
    match what:
        case "offsets":
            entry[f"data_{what}"] = random.choice(
                [[start + 1, end + 1], [start, end + 4], [start - 4, end], [end, start - 1], [start, 10**20], [-1, end],
                 [start, end, end], [start], "x", [str(start), end], [start, None], [float(start), end], {}, None]
            )  # fmt: skip
        case "dtype":
            other = [name for name in SIZES if SIZES[name] != SIZES[entry["dtype"]]]
            entry["dtype"] = random.choice([*other, "", "f32", None, 3, [], {}])
        case "shape":
            entry["shape"] = random.choice(
                [[size + 1 for size in shape] or [2], [-size for size in shape] or [-1], [1] * 9, None, "x", [shape],
                 [float(size) for size in shape] or [1.0], [str(size) for size in shape] or ["1"], [2**62] * 2]
            )  # fmt: skip
        case "left out":
            del header[key]
            return Damage(
                what, upload.with_file(file, with_header(header, body)), Must.REFUSE, (file, *header)
            )
        case _:
            raw = json.dumps(header)[:-1] + f", {json.dumps(key)}: {json.dumps(entry)}}}"
            return Damage(what, upload.with_file(file, with_header(raw.encode(), body)), Must.REFUSE, (key,))
    return Damage(what, upload.with_file(file, with_header(header, body)), Must.REFUSE, (key,))


def tensor_damage(upload: Upload, random: Random) -> Damage:
    """A well-formed tensor file with other tensors: of another rank, under other names, missing, unknown."""
    file = random.choice(upload.tensor_files)
    tensors = Tensors.of(upload.files[file])
    entries = tensors.entries
    index = random.randrange(len(entries))
    name, dtype, shape, data = entries[index]
    native = upload.name.startswith("native")  # which has no config beside it to contradict
    keys, must = (name,), Must.REFUSE
    what = random.choice(
        ["size", "rank", "turned", "dropped", "renamed", "swapped", "unknown", "cast", "nan", "order"]
    )
    match what:
        case "size":
            new, at = [*shape] or [1], random.randrange(max(1, len(shape)))
            new[at] = random.choice([new[at] + 1, 2 * new[at], max(1, new[at] - 1), 0])
            entries[index] = (name, dtype, new, (data * 3)[: _count(new) * SIZES[dtype]])
            # OpenDelta's config does not say how many labels a head has
            must = Must.ANSWER if native or name.startswith(("score.", "classifier.")) else Must.REFUSE
        case "rank":
            entries[index] = (
                name,
                dtype,
                random.choice([[*shape, 1, 1], [*shape, 2], [1, 1, 1, *shape]]),
                data,
            )
            entries[index] = (
                name,
                dtype,
                entries[index][2],
                (data * 2)[: _count(entries[index][2]) * SIZES[dtype]],
            )
        case "turned":
            entries[index] = (name, dtype, shape[::-1], data)
            must = Must.ANSWER if native else Must.REFUSE
        case "dropped":
            del entries[index]
            must = Must.ANSWER if native or upload.name.startswith("opendelta") else Must.REFUSE
        case "renamed":
            taken = {entry[0] for entry in entries}
            new_name = random.choice(
                [f"{name}x", name[:-1], name.upper(), f"x{name}", name.replace(".", "..", 1), f"{name}.default", "",
                 name.replace("layers.0", "layers.7"), name.replace("layers.0", "layers.00"), "a" * 600, f"\u0661{name}",
                 name.replace("layers.0", "layers.-1"), name.replace("0", "\u0660", 1)]
            )  # fmt: skip
            if new_name in taken:
                new_name = f"{name}x"
            entries[index] = (new_name, dtype, shape, data)
            keys = (name, new_name)
        case "swapped":
            other = random.randrange(len(entries))
            partner = entries[other]
            entries[index], entries[other] = (partner[0], dtype, shape, data), (name, *partner[1:])
            keys = (name, partner[0])
            must = Must.REFUSE if sorted(partner[2]) != sorted(shape) and not native else Must.ANSWER
        case "unknown":
            new_name = random.choice(
                ["extra", "base_model.model.x.lora_A.weight", f"{name}2", name.replace("0", "9")]
            )
            new_name = new_name if new_name not in {entry[0] for entry in entries} else f"{name}.more"
            entries.append((new_name, dtype, shape, data))
            keys = (name, new_name)
        case "cast":
            new_type = random.choice([t for t in ("F16", "BF16", "F64", "I64", "I32") if t != dtype])
            entries[index] = (name, new_type, shape, bytes(_count(shape) * SIZES[new_type]))
            must = Must.REFUSE if dtype.startswith("F") and new_type.startswith("I") else Must.ANSWER
        case "nan":
            if dtype == "F32" and data:
                at = 4 * random.randrange(len(data) // 4)
                bad = random.choice([b"\0\0\xc0\x7f", b"\0\0\x80\x7f", b"\0\0\x80\xff"])
                entries[index] = (name, dtype, shape, data[:at] + bad + data[at + 4 :])
        case _:
            random.shuffle(entries)
            must = Must.KEEP
            if not native:
                tensors.metadata = random.choice([None, {"format": "pt"}, {"note": "x" * 1000}])
    return Damage(what, upload.with_file(file, tensors.pack()), must, keys)


def _paths(value: dict[str, Any], before: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    found: list[tuple[str, ...]] = []
    for key, inner in value.items():
        found.append((*before, key))
        if isinstance(inner, dict):
            found += _paths(inner, (*before, key))
    return found


def _spoil(value: dict[str, Any], random: Random) -> tuple[str, str]:
    """Change one key of a JSON object, in place, at any depth: what was done, and the key."""
    paths = _paths(value)
    what = random.choice(["junk", "junk", "junk", "removed", "added"]) if paths else "added"
    if what == "added":
        key = random.choice(["surprise", "auto_map", "__class__", "k" * 3000, "\u202e"])
        value[key] = random.choice(JUNK)
        return what, key
    path = random.choice(paths)
    for step in path[:-1]:
        value = value[step]
    if what == "removed":
        del value[path[-1]]
    else:
        value[path[-1]] = random.choice(JUNK)
    return what, path[-1]


def config_damage(upload: Upload, random: Random) -> Damage:
    """A config with another value, or that is no JSON object any more; a native file's manifest counts as one."""
    if not upload.json_files:
        (file,) = upload.tensor_files
        tensors = Tensors.of(upload.files[file])
        manifest = json.loads(tensors.metadata["deltaserve"])
        what, key = _spoil(
            manifest if random.randrange(4) == 0 else random.choice(manifest["components"]), random
        )
        tensors.metadata["deltaserve"] = json.dumps(manifest)
        return Damage(f"manifest {what}", upload.with_file(file, tensors.pack()), Must.ANSWER, (key,))
    file = random.choice(upload.json_files)
    data = upload.files[file]
    match random.randrange(8):
        case 0:
            made = bytearray(data)
            made[random.randrange(len(made))] = random.randrange(256)
            return Damage("config byte", upload.with_file(file, bytes(made)), Must.ANSWER, ())
        case 1:
            cut = data.rstrip()[: random.randrange(len(data.rstrip()))]
            return Damage("config cut", upload.with_file(file, cut), Must.REFUSE, (file,))
        case 2:
            other = json.dumps(random.choice([[], 1, None, "x", [json.loads(data)]])).encode()
            return Damage("config of another kind", upload.with_file(file, other), Must.REFUSE, (file,))
        case _:
            config = json.loads(data)
            what, key = _spoil(config, random)
            changed = upload.with_file(file, json.dumps(config).encode())
            return Damage(f"config {what}", changed, Must.ANSWER, (key,))


def file_damage(upload: Upload, random: Random) -> Damage:
    """A file missing, empty, renamed, unknown, or in another's place."""
    files, names = dict(upload.files), sorted(upload.files)
    file = random.choice(names)
    what = random.choice(["missing", "unknown", "renamed", "empty", "exchanged"])
    keys = (file,)
    match what:
        case "missing":
            del files[file]
        case "unknown":
            new = random.choice(
                ["x.py", "weights.pkl", "a/b/c", "delta.safetensors", "config.json", "more.zip"]
            )
            new = new if new not in files else "x.py"
            files[new] = random.choice([b"", b"{}", files[file]])
            keys = (file, new)
        case "renamed":
            new = random.choice(["x", f"../{file}", file.upper(), f"{file} "])
            files[new] = files.pop(file)
            keys = (file, new)
        case "empty":
            files[file] = b""
        case _:
            files = dict(zip(names, [files[name] for name in [*names[1:], names[0]]], strict=True))
            keys = tuple(names)
    changed = Upload(upload.name, upload.family, files)
    return Damage(f"file {what}", changed, Must.ANSWER if what == "missing" else Must.REFUSE, keys)


KINDS: tuple[Callable[[Upload, Random], Damage], ...] = (
    bytes_damage,
    header_damage,
    tensor_damage,
    tensor_damage,
    config_damage,
    config_damage,
    file_damage,
)


def damage(upload: Upload, random: Random) -> Damage:
    """One change of any kind."""
    return random.choice(KINDS)(upload, random)
