"""The Dockerfile, where no container engine runs: what it copies and runs, and its build step replayed."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from server.config import unknown_variables

ROOT = Path(__file__).resolve().parents[2]
STAGES = {"cpu-base", "cuda-base", "cpu-build", "cuda-build", "cpu", "cuda"}
PACKAGED = {".py", ".c", ".h", ".lua", ".html", ".css", ".js", ".typed"}


def _stages() -> dict[str, list[str]]:
    """Stage name -> its instructions, each on one line."""
    text = re.sub(r"(?m)^#.*\n", "", (ROOT / "Dockerfile").read_text()).replace("\\\n", " ")
    stages: dict[str, list[str]] = {}
    current: list[str] = []
    for line in filter(None, (re.sub(r"\s+", " ", line).strip() for line in text.splitlines())):
        if line.startswith("FROM "):
            current = stages.setdefault(line.rpartition(" AS ")[2], [])
        current.append(line)
    return stages


def _copied(stage: str) -> list[str]:
    """Paths that a stage copies from the build context."""
    copies = [line.split()[1:] for line in _stages()[stage] if line.startswith("COPY ")]
    return [source for copy in copies if not copy[0].startswith("--from") for source in copy[:-1]]


def test_targets() -> None:
    assert set(_stages()) == STAGES


@pytest.mark.parametrize("stage", ["build", ""])
def test_both_targets_are_made_alike(stage: str) -> None:
    cpu, cuda = ("-".join(filter(None, (kind, stage))) for kind in ("cpu", "cuda"))
    assert [line.replace("cuda", "cpu") for line in _stages()[cuda]] == _stages()[cpu]


@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_the_server_runs_as_nobody_special(target: str) -> None:
    lines = _stages()[target]
    assert "USER deltaserve" in lines
    assert lines.index("USER deltaserve") < lines.index('ENTRYPOINT ["deltaserve"]')
    assert "VOLUME /data" in lines
    assert any(line.startswith("HEALTHCHECK ") for line in lines)


def test_the_image_s_settings_are_the_server_s() -> None:
    (environment,) = (line for line in _stages()["cpu"] if line.startswith("ENV "))
    settings = dict(re.findall(r"(DELTASERVE_\w+)=(\S+)", environment))
    assert settings == {"DELTASERVE_HOST": "0.0.0.0", "DELTASERVE_DATA_DIR": "/data"}
    assert unknown_variables(settings) == []


def test_what_is_copied_exists_and_is_sent_to_the_builder() -> None:
    sent = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = {path for stage in STAGES for path in _copied(stage)}
    assert [path for path in copied if not (ROOT / path).exists()] == []
    assert copied == sent


def test_image_and_make_install_by_the_same_script() -> None:
    for file, dependencies, project in (
        ("Dockerfile", "/opt/deltaserve/bin/python requirements.lock", "/opt/deltaserve/bin/python"),
        ("Makefile", "$(BIN)/python requirements-dev.lock", "$(BIN)/python -e"),
    ):
        text = (ROOT / file).read_text()
        assert "pip install" not in text
        calls = re.findall(r"deploy/install\.sh (\w+) (.+)", text)
        assert set(calls) == {("dependencies", dependencies), ("project", project)}


def test_the_build_step_packs_everything(tmp_path: Path) -> None:
    """What the image copies, built as the image builds it, holds every source file and the command."""
    source = tmp_path / "source"
    for path in _copied("cpu-build"):
        (source / path).parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / path).is_dir():
            shutil.copytree(ROOT / path, source / path, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / path, source / path)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index"]
    done = subprocess.run(
        [*command, "--wheel-dir", str(tmp_path), "."], cwd=source, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = tmp_path.glob("deltaserve-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        packed = set(archive.namelist())
        (entry_points,) = (name for name in packed if name.endswith("entry_points.txt"))
        assert "deltaserve = server.cli:main" in archive.read(entry_points).decode()
    wanted = {
        path.relative_to(ROOT).as_posix()
        for top in ("server", "deltas")
        for path in (ROOT / top).rglob("*")
        if path.suffix in PACKAGED and "__pycache__" not in path.parts
    }
    assert sorted(wanted - packed) == []
