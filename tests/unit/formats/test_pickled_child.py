"""The process that converts pickled files: confined, killed when it takes too much, never left behind."""

from __future__ import annotations

import os
import pickle
import select
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import pytest
import torch

from deltas.formats.pickled import Limits
from tests.unit.formats.pickled_files import NAME, Call, archive, converted, refused


@pytest.mark.parametrize(
    "pickled",
    [
        b"\x80\x02" + b"(]" * 1_000_000 + b".",
        b"\x80\x02}" + b")" + b"\x85" * 1_000_000 + b"K\x01s.",  # a dict with a deep tuple as its key
        pickle.dumps({"a": Call(bytearray, 1 << 40)}, 2),
        pickle.dumps({"a": Call(torch.Tensor, 1 << 40)}, 2),
        b"\x80\x02X\xff\xff\xff\xffabc.",
        b"",
    ],
    ids=["lists", "tuples", "bytearray", "tensor", "string", "nothing"],
)
def test_pickles_that_exhaust_something(tmp_path: Path, pickled: bytes) -> None:
    assert refused(archive(tmp_path / NAME, pickled))


def test_archives_that_unpack_to_more_than_themselves(tmp_path: Path) -> None:
    small = pickle.dumps({}, 2)
    bomb = archive(tmp_path / NAME, small, bytes(64 << 20), compression=zipfile.ZIP_DEFLATED)
    assert bomb.stat().st_size < 1 << 20
    assert refused(bomb) == "is compressed, which torch.save never does"

    (tmp_path / "overlapping").mkdir()
    path = tmp_path / "overlapping" / NAME
    with zipfile.ZipFile(path, "w") as out:
        out.writestr("archive/data.pkl", small)
        out.writestr("archive/data/0", bytes(1 << 16))
        for index in range(1, 100):
            twin = zipfile.ZipInfo(f"archive/data/{index}")
            first = out.filelist[1]
            twin.header_offset, twin.CRC = first.header_offset, first.CRC
            twin.file_size, twin.compress_size = first.file_size, first.compress_size
            out.filelist.append(twin)
    assert refused(path) == "has members that claim more bytes than there are"


def test_computing_without_end_is_killed(tmp_path: Path) -> None:
    path = archive(tmp_path / NAME, b"\x80\x02" * 16_000_000)
    assert refused(path, Limits(cpu_seconds=1)) == "takes more than 1 seconds of computing to convert"


def test_a_child_that_hangs_is_killed(tmp_path: Path) -> None:
    path = tmp_path / NAME
    os.mkfifo(path)  # opening it waits for a writer
    assert refused(path, Limits(seconds=3)) == "takes more than 3 seconds to convert"
    with pytest.raises(OSError, match="No such device"):  # nobody reads it any more
        os.open(path, os.O_WRONLY | os.O_NONBLOCK)


def test_a_child_that_cannot_start_is_not_the_files_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save({"a": torch.ones(1)}, tmp_path / NAME)
    monkeypatch.setattr("deltas.formats.pickled._CHILD", str(tmp_path / "is-not-there.py"))
    with pytest.raises(RuntimeError, match=r"failed to start.*is-not-there"):
        converted(tmp_path / NAME)


_CONVERT = """
import subprocess, sys
from pathlib import Path
from deltas.formats import pickled

class Told(subprocess.Popen):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        print(self.pid, flush=True)

subprocess.Popen = Told
pickled.convert(Path(sys.argv[1]), "a.bin", Path(sys.argv[2]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux about a process")
def test_the_child_is_confined_and_ends_with_its_parent(tmp_path: Path) -> None:
    path, folder, held = tmp_path / NAME, tmp_path / "work", tmp_path / "held"
    folder.mkdir()
    os.mkfifo(path)
    held.touch()
    root = Path(__file__).parents[3]
    with held.open() as inherited:
        os.set_inheritable(inherited.fileno(), True)
        parent = subprocess.Popen(
            [sys.executable, "-c", _CONVERT, str(path), str(folder)],
            stdout=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": str(root), "DELTASERVE_ADMIN_KEY": "secret"},
            close_fds=False,
        )
    opened: list[int] = []
    # Waits until the child has set its limits and opens its source; it then waits for bytes.
    opener = threading.Thread(target=lambda: opened.append(os.open(path, os.O_WRONLY)), daemon=True)
    opener.start()
    with parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        opener.join(60)
        assert opened
        child = os.pidfd_open(pid)
        try:
            seen = Path(f"/proc/{pid}")
            assert b"secret" not in (seen / "environ").read_bytes()
            names = {entry.split(b"=")[0] for entry in (seen / "environ").read_bytes().split(b"\0") if entry}
            assert names == {b"CUDA_VISIBLE_DEVICES", b"OMP_NUM_THREADS", b"TMPDIR"}
            assert (seen / "cwd").resolve() == folder.resolve()
            open_files = {os.readlink(link) for link in (seen / "fd").iterdir()}
            assert open_files == {
                "/dev/null",
                *(str(file.resolve()) for file in (path, folder / "report", folder / "log")),
            }
            limits = {
                line[:26].strip(): line[26:].split()[:2] for line in (seen / "limits").read_text().split("\n")
            }
            assert limits["Max core file size"] == ["0", "0"]
            assert limits["Max processes"] == ["0", "0"]
            assert limits["Max open files"] == ["64", "64"]
            assert limits["Max file size"] == [str(16 << 20)] * 2
            assert 60 <= int(limits["Max cpu time"][0]) < 120
            assert 1 << 29 <= int(limits["Max address space"][0]) < 1 << 36
        finally:
            parent.kill()
            poll = select.poll()
            poll.register(child, select.POLLIN)
            ended = poll.poll(30_000)
            os.close(opened[0])
            os.close(child)
        assert ended
