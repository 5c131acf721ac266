"""Archives under attack: each ends in a refusal that names the member, with nothing written outside its folder."""

from __future__ import annotations

import gzip
import io
import random
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from server.api import archives
from server.api.archives import FREE_BYTES, MAX_MEMBERS, MAX_RATIO, unpack
from server.errors import DeltaserveError, InvalidRequest, TooLarge

LIMIT = 1 << 20
SUFFIXES = ("zip", "tar", "tar.gz")
Members = Mapping[str, bytes]


def a_zip(members: Members, method: int = zipfile.ZIP_DEFLATED) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return out.getvalue()


def a_tar(members: Members, form: int = tarfile.PAX_FORMAT) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=form) as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return out.getvalue()


def packed(members: Members, suffix: str) -> bytes:
    if suffix == "zip":
        return a_zip(members)
    plain = a_tar(members)
    return plain if suffix == "tar" else gzip.compress(plain)


def entry(name: str, kind: bytes = tarfile.REGTYPE, size: int = 0, link: str = "") -> bytes:
    info = tarfile.TarInfo(name)
    info.type, info.size, info.linkname = kind, size, link
    return info.tobuf(tarfile.GNU_FORMAT)


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 512)


END = bytes(1024)


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Callable[..., dict[str, bytes]]]:
    """Unpacks bytes of an archive; afterwards checks that nothing was written but members of our own naming."""
    inside = tmp_path / "in"
    inside.mkdir()
    (tmp_path / "canary").write_text("untouched")

    def run(content: bytes, suffix: str, limit: int = LIMIT) -> dict[str, bytes]:
        for left in inside.iterdir():
            left.unlink()
        path = tmp_path / f"a.{suffix}"
        path.write_bytes(content)
        found = unpack(path, path.name, inside, limit)
        assert {path.parent for path in found.values()} == {inside}
        return {name: path.read_bytes() for name, path in found.items()}

    yield run
    assert (tmp_path / "canary").read_text() == "untouched"
    assert all(path.name.startswith("member-") and path.is_file() for path in inside.iterdir())
    assert {path.name for path in tmp_path.iterdir()} <= {"in", "canary", *(f"a.{s}" for s in SUFFIXES)}


Open = Callable[..., dict[str, bytes]]


def refused(opened: Open, content: bytes, suffix: str, *, naming: str = "", limit: int = LIMIT) -> str:
    with pytest.raises(InvalidRequest) as caught:
        opened(content, suffix, limit)
    assert naming in caught.value.message, caught.value.message
    assert caught.value.param == "file"
    return caught.value.message


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_plain_archives(opened: Open, suffix: str) -> None:
    flat = {"a.json": b"{}", "b.bin": bytes(range(256)) * 10, "empty": b"", "block": b"x" * 512}
    assert opened(packed(flat, suffix), suffix) == flat
    for prefix in ("./", "folder/", "deep/er/"):
        moved = {prefix + name: content for name, content in flat.items()}
        assert opened(packed(moved, suffix), suffix) == flat
    apart = {"x/one/c.json": b"1", "x/two/c.json": b"2", "x/one,two/f.json": b"3"}
    assert opened(packed(apart, suffix), suffix) == {name[2:]: content for name, content in apart.items()}
    composed = {"m/adapter_setup.json": b"{}", "m/one/adapter_config.json": b"{}"}
    assert opened(packed(composed, suffix), suffix).keys() == {
        "adapter_setup.json",
        "one/adapter_config.json",
    }
    assert "no files" in refused(opened, packed({}, suffix), suffix)


def test_what_tar_itself_writes(opened: Open, tmp_path: Path) -> None:
    long = "f" * 120 + ".json"
    members = {f"{'d' * 90}/{long}": b"1", "é.json": b"2", "plain": b"3" * 5000}
    expected = {long: b"1", "é.json": b"2", "plain": b"3" * 5000}
    for form in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        assert opened(a_tar(members, form), "tar") == expected
    assert opened(a_tar({"plain": b"3"}, tarfile.USTAR_FORMAT), "tar") == {"plain": b"3"}
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        archive.addfile(tarfile.TarInfo("x"), io.BytesIO())
    folder = entry("folder/", tarfile.DIRTYPE)
    assert opened(folder + entry("folder/x", size=3) + padded(b"abc") + END, "tar") == {"x": b"abc"}
    note = b"52 comment=0123456789012345678901234567890123456789\n"  # as git archive writes it
    globally = entry("pax_global_header", tarfile.XGLTYPE, len(note)) + padded(note)
    assert opened(globally + entry("x") + END, "tar") == {"x": b""}


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize(
    "name",
    [
        "/etc/x",
        "../x",
        "a/../../x",
        "a/..",
        "..",
        "C:\\x",
        "..\\x",
        "a\\..\\..\\x",
        "a\x01b",
        "a\nb",
        "a/b/c/d/e",
        "x" * 300,
    ],
)
def test_names_that_leave_or_lie(opened: Open, suffix: str, name: str) -> None:
    refused(opened, packed({"good": b"1", name: b"2"}, suffix), suffix, naming=repr(name)[1:60].rstrip("'"))


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_names_twice(opened: Open, suffix: str) -> None:
    if suffix == "zip":
        content = a_zip({"a/x": b"1", "a/y": b"2"}).replace(b"a/y", b"a/x")
    else:
        content = entry("a/x") + entry("./a//x") + END
        content = gzip.compress(content) if suffix == "tar.gz" else content
    assert "Two of" in refused(opened, content, suffix, naming="x'")


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("inner", SUFFIXES)
def test_archives_in_archives(opened: Open, suffix: str, inner: str) -> None:
    content = packed({"a.json": b"{}", f"more.{inner}": packed({"x": b"1"}, inner)}, suffix)
    assert "an archive itself" in refused(opened, content, suffix, naming=f"more.{inner}")


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (tarfile.SYMTYPE, "symbolic link"),
        (tarfile.LNKTYPE, "hard link"),
        (tarfile.CHRTYPE, "device"),
        (tarfile.BLKTYPE, "device"),
        (tarfile.FIFOTYPE, "pipe"),
        (tarfile.GNUTYPE_SPARSE, "sparse"),
        (b"M", "unknown kind"),
        (b"V", "unknown kind"),
        (b"Z", "unknown kind"),
    ],
)
def test_tar_members_that_are_no_files(opened: Open, kind: bytes, said: str) -> None:
    content = entry("ok") + entry("odd", kind, link="ok") + END
    for suffix, made in (("tar", content), ("tar.gz", gzip.compress(content))):
        assert said in refused(opened, made, suffix, naming="'odd'")
    through = entry("odd", tarfile.SYMTYPE, link="..") + entry("odd/x", size=1) + padded(b"1") + END
    refused(opened, through, "tar", naming="'odd'")


@pytest.mark.parametrize("mode", [0o120777, 0o010644, 0o020644, 0o060644, 0o140644, 0o040755])
def test_zip_members_that_are_no_files(opened: Open, mode: int) -> None:
    info = zipfile.ZipInfo("odd")
    info.external_attr = mode << 16
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr(info, "/etc/passwd")
    assert "not a file" in refused(opened, out.getvalue(), "zip", naming="'odd'")


def flagged(content: bytes, flags: int, method: int | None = None) -> bytes:
    """A zip of one member with other flags (and method), in both its headers."""
    made = bytearray(content)
    for signature, at in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        start = made.index(signature) + at
        (own,) = struct.unpack_from("<H", made, start)
        struct.pack_into("<H", made, start, own | flags)
        if method is not None:
            struct.pack_into("<H", made, start + 2, method)
    return bytes(made)


def test_zips_that_are_encrypted_or_compressed_oddly(opened: Open) -> None:
    for flags in (0x1, 0x41, 0x2001):
        made = flagged(a_zip({"secret.json": b"{}"}), flags)
        assert "encrypted" in refused(opened, made, "zip", naming="'secret.json'")
    for method in (zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):  # an LZMA entry chooses how much memory it takes
        refused(opened, a_zip({"odd.json": b"{}"}, method), "zip", naming="'odd.json'")
    refused(opened, flagged(a_zip({"odd.json": b"{}"}), 0, 99), "zip", naming="'odd.json'")


def test_zips_whose_members_share_their_bytes(opened: Open) -> None:
    """The central directory may name one stretch of data many times: a bomb that no ratio shows."""
    whole = random.Random(0).randbytes(1000)
    one = a_zip({"a": whole})
    start, end = one.index(b"PK\x01\x02"), one.index(b"PK\x05\x06")
    record = one[start:end]
    directory = b"".join(record[:-1] + bytes([97 + i]) for i in range(20))
    tail = struct.pack("<4s4H2IH", b"PK\x05\x06", 0, 0, 20, 20, len(directory), start, 0)
    refused(opened, one[:start] + directory + tail, "zip")


@pytest.mark.parametrize("suffix", ["zip", "tar.gz"])
def test_bombs(opened: Open, suffix: str) -> None:
    content = packed({"a.json": b"{}", "bomb.safetensors": bytes(FREE_BYTES + (8 << 20))}, suffix)
    assert len(content) * MAX_RATIO < FREE_BYTES
    assert str(MAX_RATIO) in refused(opened, content, suffix, naming="'bomb.safetensors'", limit=1 << 30)
    fair = {"zeros.safetensors": bytes(FREE_BYTES - 4096)}
    assert opened(packed(fair, suffix), suffix, 1 << 30) == fair
    with pytest.raises(TooLarge, match=r"zeros\.safetensors"):
        opened(packed(fair, suffix), suffix, 1 << 20)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_counts(opened: Open, suffix: str) -> None:
    many = {f"f{i}": b"1" for i in range(MAX_MEMBERS)}
    assert opened(packed(many, suffix), suffix) == many
    refused(opened, packed(many | {"last": b"1"}, suffix), suffix, naming="'last'")
    with pytest.raises(TooLarge, match="second"):
        opened(packed({"first": bytes(600), "second": bytes(600)}, suffix), suffix, 1000)


def hostile_tars() -> Iterator[tuple[str, bytes]]:
    good = entry("x", size=3) + padded(b"abc")
    yield "cut short in data", entry("x", size=2000) + b"abc"
    yield "cut short before its end", good
    yield "without an end", good + bytes(511)
    yield "a second tar behind it", good + END + entry("hidden", size=1) + padded(b"1") + END
    yield "a broken header between", good + b"\xff" * 512 + entry("hidden") + END
    yield "more zeros than a tar ends with", good + bytes(2 << 20)
    for kind in (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK):
        yield "a large header", entry("h", kind, 1 << 20) + bytes(1 << 20) + good + END
        yield "many headers", (entry("h", kind, 3) + padded(b"7 a=b\n"[:3])) * 5000 + good + END
    for text in (b"0 path=x\n", b"999999 path=x\n", b"9 path=x", b"path=x\n", b"12 path=x\n", b"9 path\n\n"):
        yield "a malformed record", entry("h", tarfile.XHDTYPE, len(text)) + padded(text) + good + END
    for size in (b"-5", b"9" * 40, b"1e9", b"0x10", b"3 ", "٣".encode()):
        body = b" size=" + size + b"\n"
        text = str(len(body) + 2).encode() + body
        yield "a malformed size", entry("h", tarfile.XHDTYPE, len(text)) + padded(text) + good + END
    climbing = b"16 path=../evil\n"
    yield "a path behind the back", entry("h", tarfile.XHDTYPE, len(climbing)) + padded(climbing) + good + END
    yield "a path for all", entry("h", tarfile.XGLTYPE, len(climbing)) + padded(climbing) + good + END
    sparse = b"22 GNU.sparse.major=1\n22 GNU.sparse.minor=0\n"
    yield "a sparse file", entry("h", tarfile.XHDTYPE, len(sparse)) + padded(sparse) + good + END
    negative = bytearray(entry("x"))
    negative[124:136] = b"\xff" * 11 + b"\x00"
    negative[148:156] = b"%06o\0 " % (256 + sum(negative[:148]) + sum(negative[156:]))
    yield "a negative size", bytes(negative) + END
    extended = bytearray(entry("x", tarfile.GNUTYPE_SPARSE))
    extended[482] = 1  # "another block of the map follows", for ever
    extended[148:156] = b"%06o\0 " % (256 + sum(extended[:148]) + sum(extended[156:]))
    yield "an endless sparse map", bytes(extended) + (b"1" * 504 + b"\1" * 8) * 20_000


def test_hostile_tars(opened: Open) -> None:
    for why, content in hostile_tars():
        for suffix, made in (("tar", content), ("tar.gz", gzip.compress(content))):
            try:
                found = opened(made, suffix)
            except InvalidRequest:
                continue
            pytest.fail(f"{why}: {suffix} gave {found}")


def hostile_gzips() -> Iterator[tuple[str, bytes]]:
    good = gzip.compress(a_tar({"x": b"abc"}))
    yield "nothing", b""
    yield "cut short", good[:-9]
    yield "no checksum", good[:-8]
    yield "a wrong checksum", good[:-8] + bytes(8)
    yield "a second stream", good + gzip.compress(a_tar({"hidden": b"1"}))
    yield "rubbish behind", good + b"rubbish"
    yield "no gzip", zlib.compress(a_tar({"x": b"abc"}))
    yield "a name without an end", b"\x1f\x8b\x08\x08" + bytes(6) + b"n" * 100_000
    yield "nothing but zeros", gzip.compress(bytes(1 << 24))


def test_hostile_gzips(opened: Open) -> None:
    for why, content in hostile_gzips():
        try:
            found = opened(content, "tar.gz")
        except InvalidRequest:
            continue
        pytest.fail(f"{why} gave {found}")


def test_a_compressed_tar_is_read_once(opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    """However its members' sizes fall: seeking back would unpack it again from the start, for every member."""
    members = {f"m{i}": random.Random(i).randbytes(512 * (i + 1)) for i in range(MAX_MEMBERS)}
    content = packed(members, "tar.gz")
    given = 0
    read = archives._Inflated.read

    def counted(self: archives._Inflated, size: int, /) -> bytes:
        nonlocal given
        data = read(self, size)
        given += len(data)
        return data

    monkeypatch.setattr(archives._Inflated, "read", counted)
    assert opened(content, "tar.gz", 1 << 24) == members
    assert given <= len(gzip.decompress(content))


BASES = {
    suffix: packed({"a/x.json": b'{"a": 1}', "a/y.bin": bytes(range(200))}, suffix) for suffix in SUFFIXES
}
BASES["zip2"] = a_zip({"x.json": b"{}" * 50, "y": b"\0" * 600}, zipfile.ZIP_STORED)
BASES["tar2"] = a_tar({"d" * 101 + "/" + "f" * 101: b"1"}, tarfile.GNU_FORMAT)
BASES["tar3"] = a_tar({"d" * 101 + "/" + "é" * 101: b"1"}, tarfile.PAX_FORMAT)


@settings(
    max_examples=1500,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_damaged_archives_are_read_or_refused(data: st.DataObject, opened: Open) -> None:
    """Whatever is flipped, cut, repeated or lengthened: a refusal or files, nothing else."""
    base = data.draw(st.sampled_from(sorted(BASES)))
    suffix, made = base.rstrip("23"), bytearray(BASES[base])
    if suffix == "tar.gz" and data.draw(st.booleans()):
        made = bytearray(gzip.decompress(made))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, max(0, min(len(made) - 1, 1500))))
        match data.draw(st.sampled_from(["byte", "cut", "repeat", "number", "swap"])):
            case "byte":
                made[at : at + 1] = bytes([data.draw(st.integers(0, 255))])
            case "cut":
                del made[at : at + data.draw(st.integers(1, 600))]
            case "repeat":
                made[at:at] = made[at : at + data.draw(st.integers(1, 600))]
            case "number":
                made[at : at + 4] = struct.pack(
                    "<I", data.draw(st.sampled_from([0, 1, 2**31, 2**32 - 1, 512]))
                )
            case "swap":
                made[at : at + 2] = made[at : at + 2][::-1]
    if suffix == "tar":  # most changes to a header are caught by its checksum: go on behind it as well
        for start in range(0, len(made) - 511, 512):
            if made[start + 257 : start + 262] == b"ustar":
                total = 256 + sum(made[start : start + 148]) + sum(made[start + 156 : start + 512])
                made[start + 148 : start + 156] = b"%06o\0 " % total
    if suffix == "tar.gz" and made[:2] != b"\x1f\x8b":
        made = bytearray(gzip.compress(bytes(made)))
    problem = None
    try:
        opened(bytes(made), suffix)
    except DeltaserveError as error:
        problem = error
    if problem is not None:
        assert problem.status in (400, 413)
        problem.message.encode()
        assert len(problem.message) < 2000
