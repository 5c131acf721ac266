"""What an upload may not be: too large, a bomb, a climbing archive."""

from __future__ import annotations

import io
import os
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from server.api.archives import MAX_MEMBERS, unpack
from server.errors import InvalidRequest, TooLarge
from tests.api.running import running

LIMIT = 1 << 20


def zipped(members: dict[str, bytes], path: Path) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def tarred(entries: list[tarfile.TarInfo], path: Path) -> Path:
    with tarfile.open(path, "w:gz" if path.name.endswith("gz") else "w") as archive:
        for entry in entries:
            archive.addfile(entry, io.BytesIO(bytes(entry.size)))
    return path


def entry(name: str, size: int = 1, kind: bytes = tarfile.REGTYPE) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.size = kind, size if kind == tarfile.REGTYPE else 0
    info.linkname = "/etc/passwd"
    return info


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path


@pytest.mark.parametrize("name", ["/etc/x", "../x", "a/../../x", "a/..", "C:\\x", "..\\x", "a\x01b"])
def test_climbing_names(folder: Path, name: str) -> None:
    for path in (zipped({name: b"1"}, folder / "a.zip"), tarred([entry(name)], folder / "a.tar")):
        with pytest.raises(InvalidRequest):
            unpack(path, path.name, folder / "out", LIMIT)
    assert list((folder / "out").iterdir()) == []


@pytest.mark.parametrize(
    "kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.GNUTYPE_SPARSE]
)
def test_only_files(folder: Path, kind: bytes) -> None:
    path = tarred([entry("x", kind=kind)], folder / "a.tar")
    with pytest.raises(InvalidRequest):
        unpack(path, path.name, folder / "out", LIMIT)


def test_zip_links(folder: Path) -> None:
    info = zipfile.ZipInfo("x")
    info.external_attr = 0o120777 << 16
    with zipfile.ZipFile(folder / "a.zip", "w") as archive:
        archive.writestr(info, "/etc/passwd")
    with pytest.raises(InvalidRequest, match="not a file"):
        unpack(folder / "a.zip", "a.zip", folder / "out", LIMIT)


def test_counts_and_sizes(folder: Path) -> None:
    many = {f"f{i}": b"1" for i in range(MAX_MEMBERS + 1)}
    huge = {"a": bytes(LIMIT // 2), "b": bytes(LIMIT // 2 + 1)}
    for members, error in ((many, InvalidRequest), (huge, TooLarge)):
        tar = [entry(name, len(content)) for name, content in members.items()]
        for path in (
            zipped(members, folder / "a.zip"),
            tarred(tar, folder / "a.tar"),
            tarred(tar, folder / "a.tar.gz"),
        ):
            with pytest.raises(error):
                unpack(path, path.name, folder / "out", LIMIT)
            for left in (folder / "out").iterdir():
                left.unlink()
    assert len(unpack(zipped({"a/x": b"1", "b/y": b"2"}, folder / "b.zip"), "b.zip", folder / "out", 2)) == 2


def test_hostile_headers(folder: Path) -> None:
    pax = tarfile.TarInfo("pax")
    pax.type, pax.size = tarfile.XHDTYPE, 64 << 20
    path = folder / "a.tar"
    path.write_bytes(pax.tobuf() + bytes(64 << 20) + bytes(1024))
    with pytest.raises(InvalidRequest):
        unpack(path, path.name, folder / "out", LIMIT)
    good = zipped({"x": b"1"}, folder / "a.zip").read_bytes()
    directory = good.rindex(b"PK\x05\x06")
    lies = bytearray(good)
    lies[directory + 12 : directory + 16] = (1 << 30).to_bytes(4, "little")
    for content in (bytes(lies), good[:directory], good + good, b"", b"PK", os.urandom(1000)):
        (folder / "b.zip").write_bytes(content)
        (folder / "b.tar.gz").write_bytes(content)
        for name in ("b.zip", "b.tar.gz"):
            with pytest.raises(InvalidRequest):
                unpack(folder / name, name, folder / "out", LIMIT)


@pytest.fixture
def small(tmp_path: Path) -> Iterator[httpx.Client]:
    with running(tmp_path, max_upload_bytes=1 << 16) as server, server.client() as client:
        yield client


def test_large_uploads(small: httpx.Client, tmp_path: Path) -> None:
    big = b"x" * (3 << 20)
    announced = small.post("/v1/deltas", data={"name": "a"}, files={"file": ("a.bin", big)})
    assert (announced.status_code, announced.json()["error"]["code"]) == (413, "too_large")

    def chunks() -> Iterator[bytes]:
        yield b'--b\r\nContent-Disposition: form-data; name="file"; filename="x"\r\n\r\n'
        for _ in range(48):
            yield b"x" * 65536

    kind = {"content-type": "multipart/form-data; boundary=b"}
    assert small.post("/v1/deltas", content=chunks(), headers=kind).status_code == 413
    bomb = zipped({"adapter_config.json": bytes(1 << 17)}, tmp_path / "bomb.zip")
    answer = small.post("/v1/deltas", data={"name": "a"}, files={"file": ("b.zip", bomb.read_bytes())})
    assert answer.status_code == 413
    assert list((tmp_path / "uploads").iterdir()) == []
