"""Damaged uploads of every format: each is refused with a message that names what is wrong, or is what it was.

Bounded and the same in every run. ``mutations.py`` says for each change what must come of it; nothing but a delta or a
:class:`DeltaError` may, the process must not grow, and no file may stay.
"""

from __future__ import annotations

import gc
import json
import os
import random
import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deltas import methods
from deltas.errors import LONGEST_FIELD, DeltaError
from deltas.formats import native
from deltas.pack import pack
from tests.unit.formats.mutations import Damage, Must, damage
from tests.unit.formats.uploads import (
    Upload,
    fixture_uploads,
    frozen_of,
    header_of,
    native_twin,
    peft_uploads,
    spec_of,
    with_header,
)

LONGEST_MESSAGE = 6000
SECONDS = 20  # for reading or lowering one upload: a bound against work without end, not a measure

Samples = dict[str, list[tuple[Upload, str]]]


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Samples:
    """Uploads that are served, by library, each with its digest; native ones state no digest, which would give all away."""
    folder = tmp_path_factory.mktemp("samples")
    made: dict[str, list[Upload]] = {
        "peft": [*peft_uploads(("llama",), one_of_each=True)],
        "adapterhub": [*fixture_uploads("adapterhub_table", ("llama", "bert", "t5"))],
        "opendelta": [*fixture_uploads("opendelta_table", ("llama", "gpt2", "t5"))],
    }
    served: Samples = {}
    for library, uploads in made.items():
        served[library] = [(u, digest) for u in uploads if (digest := digest_of(u, folder)) is not None]
        assert len(served[library]) > 20
    twins = [unsigned(native_twin(u, folder)) for found in served.values() for u, _ in found[::3]]
    served["native"] = [(u, str(digest_of(u, folder))) for u in twins]
    return served


def digest_of(upload: Upload, folder: Path) -> str | None:
    try:
        return upload.read(folder).digest
    except DeltaError:
        return None  # one of the cases that are refused, with its reason, in the tables


def unsigned(upload: Upload) -> Upload:
    header, body = header_of(upload.files[native.WEIGHTS])
    metadata = header["__metadata__"]
    assert isinstance(metadata, dict)
    manifest = json.loads(metadata["deltaserve"])
    del manifest["digest"]
    metadata["deltaserve"] = json.dumps(manifest)
    return upload.with_file(native.WEIGHTS, with_header(header, body))


@contextmanager
def in_time(what: str) -> Iterator[None]:
    def late(*_: object) -> None:
        raise TimeoutError(what)

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def judge(made: Damage, digest: str, folder: Path) -> str:
    """Reads a damaged upload and checks what came of it: 'refused', 'same' or 'other'."""
    upload, about = made.upload, f"{made.what} of {made.upload.name}: {[key[:100] for key in made.keys]}"
    with in_time(about):
        try:
            delta = upload.read(folder)
        except DeltaError as error:
            check_message(made, error)
            if made.must is Must.KEEP:
                raise
            return "refused"
        if delta.digest == digest:
            return "same"
        assert made.must is Must.ANSWER, f"{about} gave another delta"
        try:  # what is accepted is also loaded: by the same rules
            patches = methods.lower(delta, spec_of(upload.family), frozen_of(upload.family))
            pack(patches, spec_of(upload.family), torch.float32)
        except DeltaError as error:
            check_message(made, error)
        return "other"


def check_message(made: Damage, error: DeltaError) -> None:
    """It is short and plain, and it names the tensor, the file or the key; ``field`` does so for programs."""
    text, field = str(error), error.field
    assert 0 < len(text) <= LONGEST_MESSAGE, f"{made.what}: {len(text)} characters"
    assert text.isprintable(), repr(text[:200])
    assert field is not None, text
    field.encode()
    assert len(field) <= LONGEST_FIELD
    assert field or "''" in text, text  # a key may be empty
    if made.upload.name.startswith("native") or "config" in made.what:
        return  # the field is the config's key, which the message may paraphrase
    names = {field, *made.keys, *made.upload.files}
    for file in made.upload.tensor_files:
        names |= names_in(made.upload.files[file])
    assert any(name[:150] in text or ascii(name)[1:-1][:150] in text for name in names if name), (field, text)


def names_in(data: bytes) -> set[str]:
    try:
        return {*header_of(data)[0]}
    except (ValueError, KeyError, TypeError, AttributeError):
        return set()  # it is the header that is damaged


@pytest.mark.parametrize("library", ["peft", "adapterhub", "opendelta", "native"])
def test_damage_is_refused_by_name_or_changes_nothing(samples: Samples, library: str, tmp_path: Path) -> None:
    @settings(
        max_examples=700,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.large_base_example],
    )
    @given(which=st.integers(0, len(samples[library]) - 1), seed=st.integers(0, 2**32))
    def run(which: int, seed: int) -> None:
        upload, digest = samples[library][which]
        judge(damage(upload, random.Random(seed)), digest, tmp_path)
        assert list(tmp_path.iterdir()) == []

    run()


def resident() -> int:
    """Bytes of this process in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def test_thousands_of_them_leave_nothing_behind(samples: Samples, tmp_path: Path) -> None:
    every = [sample for found in samples.values() for sample in found]
    outside = {path.name for path in Path(tempfile.gettempdir()).iterdir()}

    def some(count: int, seed: int) -> dict[str, int]:
        draw, outcomes = random.Random(seed), {"refused": 0, "same": 0, "other": 0}
        for _ in range(count):
            upload, digest = draw.choice(every)
            outcomes[judge(damage(upload, draw), digest, tmp_path)] += 1
        gc.collect()
        return outcomes

    some(400, 1)  # caches fill, allocators settle
    before = resident()
    outcomes = some(3000, 2)
    assert resident() - before < 24 << 20
    assert outcomes["refused"] > 2000
    assert min(outcomes.values()) > 50, outcomes
    assert list(tmp_path.iterdir()) == []
    left = {path.name for path in Path(tempfile.gettempdir()).iterdir()} - outside
    assert not {name for name in left if name.startswith(("converted-", "upload-", "part-"))}


@pytest.mark.parametrize("cut", [0, 1, 100, 0.5, -1])
def test_pickled_files_cut_short(tmp_path: Path, cut: float) -> None:
    """They end in the child process that reads them."""
    upload = next(fixture_uploads("opendelta_table", ("llama",), pickled=True))
    (file,) = (name for name in upload.files if name.endswith(".bin"))
    whole = upload.files[file]
    at = int(len(whole) * cut) if isinstance(cut, float) else cut
    with pytest.raises(DeltaError, match=file) as caught:
        upload.with_file(file, whole[:at]).read(tmp_path)
    assert caught.value.field == file
    assert list(tmp_path.iterdir()) == []
