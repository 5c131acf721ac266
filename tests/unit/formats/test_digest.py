"""One delta, one digest: whatever file, order, width or library its numbers came in."""

from __future__ import annotations

import io
import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load
from torch import Tensor

from deltas.errors import InvalidDelta
from deltas.formats import native, opendelta
from tests.unit.formats.mutations import SIZES, Tensors
from tests.unit.formats.uploads import (
    Upload,
    fixture_uploads,
    header_of,
    native_twin,
    peft_uploads,
    with_header,
)

PICKLED = {
    "adapter_model.safetensors": "adapter_model.bin",
    "adapter.safetensors": "pytorch_adapter.bin",
    opendelta.WEIGHTS: opendelta.PICKLED,
}


@pytest.fixture(scope="module")
def uploads() -> dict[str, Upload]:
    """A few of every library, among them ones with integer tensors."""
    wanted = {
        *(
            f"peft/{name}/llama"
            for name in ("lora", "lora_dora", "ia3", "shira", "prefix", "trainable_tokens")
        ),
        *(f"adapterhub/{name}/llama" for name in ("double_seq_bn", "lora", "prefix", "fuse", "mam")),
        *(f"opendelta/{name}/gpt2" for name in ("lora", "adapter", "bitfit", "soft_prompt")),
    }
    every = [
        *peft_uploads(("llama",), one_of_each=True),
        *fixture_uploads("adapterhub_table", ("llama",)),
        *fixture_uploads("opendelta_table", ("gpt2",)),
    ]
    found = {upload.name: upload for upload in every if upload.name in wanted}
    assert len(found) >= 12
    return found


def each_tensor_file(upload: Upload, change: Callable[[bytes], bytes]) -> Upload:
    for file in upload.tensor_files:
        upload = upload.with_file(file, change(upload.files[file]))
    return upload


def shuffled(data: bytes) -> bytes:
    tensors = Tensors.of(data)
    random.Random(3).shuffle(tensors.entries)
    return tensors.pack()


def relaid(data: bytes) -> bytes:
    """The same names in the same order, over data that lies in another order, in a header with spaces."""
    tensors = Tensors.of(data)
    order = list(range(len(tensors.entries)))
    random.Random(4).shuffle(order)
    places, at, body = {}, 0, b""
    for index in order:
        name, _, _, own = tensors.entries[index]
        places[name] = [at, at + len(own)]
        at, body = at + len(own), body + own
    header = {
        name: {"shape": shape, "data_offsets": places[name], "dtype": dtype}
        for name, dtype, shape, _ in tensors.entries
    }
    return with_header(json.dumps(header, indent=3).encode() + b" " * 37, body)


def noted(data: bytes) -> bytes:
    tensors = Tensors.of(data)
    tensors.metadata = {"format": "pt", "by": "somebody", "when": "today"}
    return tensors.pack()


def widened(data: bytes) -> bytes:
    """float32 as float64; int64 as int32, which holds the same indices."""
    other = {"F32": ("F64", "<f4", "<f8"), "I64": ("I32", "<i8", "<i4")}
    tensors = Tensors.of(data)
    for index, (name, dtype, shape, own) in enumerate(tensors.entries):
        if dtype in other:
            new, old, wide = other[dtype]
            array = torch.frombuffer(bytearray(own), dtype=torch.uint8).numpy().view(old).astype(wide)
            tensors.entries[index] = (name, new, shape, array.tobytes())
    return tensors.pack()


@pytest.mark.parametrize("change", [shuffled, relaid, noted, widened])
def test_the_layout_of_a_file_does_not_count(
    uploads: dict[str, Upload], tmp_path: Path, change: Callable[[bytes], bytes]
) -> None:
    for upload in uploads.values():
        changed = each_tensor_file(upload, change)
        assert changed.files != upload.files
        assert changed.read(tmp_path).digest == upload.read(tmp_path).digest, upload.name


def test_float64_that_is_not_exact_is_refused(uploads: dict[str, Upload], tmp_path: Path) -> None:
    upload = uploads["peft/lora/llama"]
    (file,) = upload.tensor_files
    tensors = Tensors.of(widened(upload.files[file]))
    name, dtype, shape, own = tensors.entries[1]
    assert (dtype, SIZES[dtype]) == ("F64", 8)
    tensors.entries[1] = (name, dtype, shape, b"\1" + own[1:])
    with pytest.raises(InvalidDelta, match="not exact") as caught:
        upload.with_file(file, tensors.pack()).read(tmp_path)
    assert caught.value.field == name


def test_the_layout_of_a_config_does_not_count(uploads: dict[str, Upload], tmp_path: Path) -> None:
    notes = {
        "base_model_name_or_path": "elsewhere",
        "peft_version": "9",
        "model_name": "other",
        "version": None,
    }
    for upload in uploads.values():
        changed = upload
        for file in upload.json_files:
            config = json.loads(upload.files[file])
            config |= {key: value for key, value in notes.items() if key in config and value}
            text = json.dumps(dict(sorted(config.items(), reverse=True)), indent=7)
            changed = changed.with_file(file, text.encode())
        assert changed.read(tmp_path).digest == upload.read(tmp_path).digest, upload.name


def test_values_and_meaning_count(uploads: dict[str, Upload], tmp_path: Path) -> None:
    """The last bit of the last number, the width of a number, a scale."""
    upload = uploads["peft/lora/llama"]
    (file,) = upload.tensor_files
    digests = {upload.read(tmp_path).digest}
    data = bytearray(upload.files[file])
    data[-4] ^= 1
    digests.add(upload.with_file(file, bytes(data)).read(tmp_path).digest)
    config = json.loads(upload.files["adapter_config.json"])
    config["lora_alpha"] += 1
    digests.add(upload.with_file("adapter_config.json", json.dumps(config).encode()).read(tmp_path).digest)
    tensors = {name: t.half() for name, t in load(upload.files[file]).items()}
    halved = Tensors([(n, "F16", list(t.shape), t.numpy().tobytes()) for n, t in tensors.items()], None)
    digests.add(upload.with_file(file, halved.pack()).read(tmp_path).digest)
    assert len(digests) == 4


def test_the_native_form_is_the_same_delta(uploads: dict[str, Upload], tmp_path: Path) -> None:
    for upload in uploads.values():
        twin = native_twin(upload, tmp_path)
        digest = upload.read(tmp_path).digest
        assert twin.read(tmp_path).digest == digest, upload.name
        again = native_twin(twin, tmp_path)
        assert again.files == twin.files, "the native form of a native file is that file"
        stated = header_of(twin.files[native.WEIGHTS])[0]["__metadata__"]
        assert digest in str(stated)


@pytest.mark.parametrize(
    "name", ["peft/lora/llama", "adapterhub/double_seq_bn/llama", "opendelta/adapter/gpt2"]
)
def test_a_pickled_file_is_the_same_delta(uploads: dict[str, Upload], tmp_path: Path, name: str) -> None:
    upload = uploads[name]
    files = dict(upload.files)
    for file in upload.tensor_files:
        tensors: dict[str, Tensor] = load(files.pop(file))
        out = io.BytesIO()
        torch.save(dict(reversed(tensors.items())), out)
        files[PICKLED[file]] = out.getvalue()
    assert Upload(name, upload.family, files).read(tmp_path).digest == upload.read(tmp_path).digest


def test_two_libraries_with_one_canonical_form_give_one_delta(
    uploads: dict[str, Upload], tmp_path: Path
) -> None:
    """A LoRA without anything beside it: PEFT's file and AdapterHub's, from the same numbers."""
    adapterhub = uploads["adapterhub/lora/llama"]
    config = json.loads(adapterhub.files["adapter_config.json"])["config"]
    (file,) = (name for name in adapterhub.tensor_files if name.startswith("adapter"))
    tensors = Tensors.of(adapterhub.files[file])
    made = [
        (f"base_model.model.{path}.{side}.weight", dtype, shape, own)
        for name, dtype, shape, own in tensors.entries
        for path, _, side in [name.replace(".loras.tone.", "\n").partition("\n")]
    ]
    peft = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": config["r"],
        "lora_alpha": config["alpha"],
        "target_modules": sorted({name.split(".")[-3] for name, *_ in made}),
    }
    twin = Upload(
        "peft/twin/llama",
        "llama",
        {
            "adapter_config.json": json.dumps(peft).encode(),
            "adapter_model.safetensors": Tensors(made, None).pack(),
        },
    )
    assert twin.read(tmp_path).digest == adapterhub.read(tmp_path).digest
