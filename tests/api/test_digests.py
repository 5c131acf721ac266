"""One delta has one digest, however it is sent: over HTTP, as files, in every archive, in the native form."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
import zipfile
from collections.abc import Mapping
from pathlib import Path

import httpx
import pytest
import torch
from safetensors.torch import load, save

from tests.api.running import lora_files

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
Files = Mapping[str, bytes]


def zipped(files: Files, method: int = zipfile.ZIP_DEFLATED, folder: str = "") -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as archive:
        for name, data in files.items():
            archive.writestr(folder + name, data)
    return out.getvalue()


def tarred(files: Files, folder: str = "", form: int = tarfile.PAX_FORMAT) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=form) as archive:
        for name, data in reversed(files.items()):
            info = tarfile.TarInfo(folder + name)
            info.size, info.mtime, info.uname = len(data), 1_700_000_000.5, "someone"
            archive.addfile(info, io.BytesIO(data))
    return out.getvalue()


def push(client: httpx.Client, files: Files) -> httpx.Response:
    return client.post("/v1/deltas", data={"name": "same"}, files=[("file", item) for item in files.items()])


@pytest.fixture
def plain(tmp_path: Path) -> dict[str, bytes]:
    return {name: path.read_bytes() for name, path in sorted(lora_files(tmp_path, seed=21).items())}


def test_however_it_is_sent(http: httpx.Client, plain: dict[str, bytes]) -> None:
    tensors = load(plain[WEIGHTS])
    pickled = io.BytesIO()
    torch.save(tensors, pickled)
    config = json.loads(plain[CONFIG])
    doubled = save({key: value.double() for key, value in reversed(tensors.items())}, {"by": "somebody"})
    first = push(http, plain)
    assert first.status_code == 201, first.text
    ways: dict[str, Files] = {
        "files": plain,
        "other order": dict(reversed(plain.items())),
        "beside a readme": {**plain, "README.md": b"# mine"},
        "zip": {"a.zip": zipped(plain)},
        "stored zip in a folder": {"a.ZIP": zipped(plain, zipfile.ZIP_STORED, "deep/er/")},
        "tar": {"a.tar": tarred(plain)},
        "gnu tar": {"a.tar": tarred(plain, "f/", tarfile.GNU_FORMAT)},
        "tar.gz": {"a.tar.gz": gzip.compress(tarred(plain))},
        "tgz": {"a.tgz": gzip.compress(tarred(plain, "./"), 1)},
        "bin": {CONFIG: plain[CONFIG], "adapter_model.bin": pickled.getvalue()},
        "bin in a zip": {"a.zip": zipped({CONFIG: plain[CONFIG], "adapter_model.bin": pickled.getvalue()})},
        "float64": {**plain, WEIGHTS: doubled},
        "config": {
            **plain,
            CONFIG: json.dumps({**config, "revision": "x"}, indent=9, sort_keys=True).encode(),
        },
        "native": {"b.tar": http.get("/v1/deltas/same/versions/1/content").content},
    }
    for way, files in ways.items():
        answer = push(http, files)
        assert answer.status_code == 200, (way, answer.text)
        assert answer.json() == first.json(), way
    other = save({key: value + 1 for key, value in tensors.items()})
    answer = push(http, {**plain, WEIGHTS: other})
    assert answer.status_code == 201
    assert answer.json()["digest"] != first.json()["digest"]
