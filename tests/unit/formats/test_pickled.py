"""Pickled files give what their safetensors twins give, and nothing else is read from them."""

from __future__ import annotations

import os
import pickle
import shutil
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig, LlamaForCausalLM

from deltas.backbones import describe
from deltas.errors import DeltaError, InvalidDelta, UnsupportedDelta
from deltas.formats import DeltaFiles, read
from deltas.sites import BackboneSpec
from deltas.weights import FrozenTensors
from tests.unit.formats.pickled_files import NAME, Call, converted, forged, refused

FIXTURES = Path(__file__).parents[2] / "oracle" / "fixtures" / "adapterhub"


def files_in(folder: Path) -> DeltaFiles:
    return DeltaFiles({path.name: path for path in folder.iterdir() if path.is_file()})


@pytest.fixture
def fixture_spec() -> BackboneSpec:
    return describe(AutoConfig.from_pretrained(FIXTURES / "backbone"), "fixture")


def test_adapterhubs_default_gives_the_same_digest(fixture_spec: BackboneSpec, tmp_path: Path) -> None:
    shutil.copytree(FIXTURES / "double_seq_bn_bin", tmp_path, dirs_exist_ok=True)
    files = files_in(tmp_path)
    delta = read(files, fixture_spec)
    assert delta.digest == read(files_in(FIXTURES / "double_seq_bn"), fixture_spec).digest
    assert list(tmp_path.glob("converted-*/*.safetensors"))
    del files
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter_config.json", "pytorch_adapter.bin"]


def test_a_pickled_copy_of_the_backbones_head(fixture_spec: BackboneSpec, tmp_path: Path) -> None:
    shutil.copytree(FIXTURES / "seq_bn_with_head", tmp_path, dirs_exist_ok=True)
    head = load_file(tmp_path / "model_head.safetensors")
    (tmp_path / "model_head.safetensors").unlink()
    torch.save(head, tmp_path / "pytorch_model_head.bin")
    frozen = FrozenTensors(FIXTURES / "backbone")
    plain = read(files_in(FIXTURES / "seq_bn"), fixture_spec)
    assert read(files_in(tmp_path), fixture_spec, frozen).digest == plain.digest
    head["lm_head.weight"][0, 0] += 1
    torch.save(head, tmp_path / "pytorch_model_head.bin")
    with pytest.raises(UnsupportedDelta, match="differs"):
        read(files_in(tmp_path), fixture_spec, frozen)


@pytest.mark.usefixtures("quiet")
def test_pefts_pickled_form_gives_the_same_digest(
    llama: LlamaForCausalLM, spec: BackboneSpec, tmp_path: Path
) -> None:
    config = peft.LoraConfig(r=3, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    config.task_type = "CAUSAL_LM"
    tuned = peft.get_peft_model(llama, config)
    tuned.save_pretrained(tmp_path / "safe")
    tuned.save_pretrained(tmp_path / "bin", safe_serialization=False)
    assert (tmp_path / "bin" / NAME).is_file()
    digests = {read(files_in(tmp_path / form), spec).digest for form in ("safe", "bin")}
    assert len(digests) == 1


@pytest.mark.parametrize("new_format", [True, False])
def test_every_kind_of_plain_tensor(tmp_path: Path, new_format: bool) -> None:
    whole = torch.arange(24.0).reshape(4, 6)
    tensors = OrderedDict(
        float32=whole,
        transposed=torch.arange(6.0).reshape(2, 3).T,
        rows=torch.arange(24.0).reshape(4, 6)[1:3],
        shared=whole[0],
        double=torch.tensor([0.1, 2.0], dtype=torch.float64),
        half=torch.tensor([[1.5]], dtype=torch.float16),
        brain=torch.tensor([-2.5, 3.0], dtype=torch.bfloat16),
        scalar=torch.tensor(7.0),
        empty=torch.zeros(0, 3),
        parameter=nn.Parameter(torch.ones(2)),
    )
    tensors["a name: \N{GREEK SMALL LETTER ALPHA}"] = torch.ones(1)
    torch.save(tensors, tmp_path / NAME, _use_new_zipfile_serialization=new_format)
    found = converted(tmp_path / NAME)
    assert set(found) == set(tensors)
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


def test_this_process_unpickles_nothing(
    fixture_spec: BackboneSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object, **__: object) -> NoReturn:
        raise AssertionError("unpickled in the serving process")

    for module, name in ((torch, "load"), (pickle, "load"), (pickle, "loads"), (zipfile, "ZipFile")):
        monkeypatch.setattr(module, name, never)
    shutil.copytree(FIXTURES / "double_seq_bn_bin", tmp_path, dirs_exist_ok=True)
    assert read(files_in(tmp_path), fixture_spec).parameters


def test_what_is_read_is_checked_like_any_upload(saved: Path, spec: BackboneSpec) -> None:
    tensors = load_file(saved / "adapter_model.safetensors")
    (saved / "adapter_model.safetensors").unlink()
    key = next(iter(tensors))
    for bad, field in (
        (tensors | {key: tensors[key] * torch.nan}, key),
        (tensors | {"more": torch.ones(1)}, "more"),
        (tensors | {key: torch.ones(3, 32)}, "r"),
        (tensors | {key: [1.0]}, NAME),
    ):
        torch.save(bad, saved / NAME)
        with pytest.raises(DeltaError) as caught:
            read(files_in(saved), spec)
        assert caught.value.field == field


@pytest.mark.parametrize("form", ["zip", "legacy", "plain"])
def test_code_never_runs(tmp_path: Path, form: str) -> None:
    marker, path = tmp_path / "marker", tmp_path / NAME
    evil = {"a": torch.ones(1), "b": Call(os.system, f"touch {marker}")}
    if form == "plain":
        path.write_bytes(pickle.dumps(evil["b"], 2))
    else:
        torch.save(evil, path, _use_new_zipfile_serialization=form == "zip")
    message = refused(path)
    assert not marker.exists()
    assert message == (
        "is not a file that torch.save wrote"
        if form == "plain"
        else "refers to 'posix.system', which is not part of a plain tensor"
    )


@pytest.mark.parametrize("new_format", [True, False])
def test_truncated_files(tmp_path: Path, new_format: bool) -> None:
    whole = tmp_path / "whole"
    torch.save({"a": torch.ones(100)}, whole, _use_new_zipfile_serialization=new_format)
    raw = whole.read_bytes()
    for length in (10, len(raw) // 2, len(raw) - 1):
        folder = tmp_path / str(length)
        folder.mkdir()
        (folder / NAME).write_bytes(raw[:length])
        assert refused(folder / NAME).startswith("is ")


HUGE = 1 << 20
BASE = torch.zeros(100_000)


def sparse() -> Tensor:
    return torch.sparse_coo_tensor(torch.zeros(2, 1, dtype=torch.int64), torch.ones(1), (HUGE, HUGE))


def sparse_rows() -> Tensor:
    return torch.sparse_csr_tensor(torch.tensor([0, 1]), torch.tensor([0]), torch.ones(1), (1, 1 << 40))


# What torch saves without complaint, and what is wrong with it.
NOT_PLAIN: dict[str, tuple[Callable[[], object], str]] = {
    "sparse": (lambda: {"a": sparse()}, "is not a dense tensor"),
    "sparse rows": (lambda: {"a": sparse_rows()}, "is not a dense tensor"),
    "meta": (lambda: {"a": torch.empty(HUGE, HUGE, device="meta")}, "is not a dense tensor"),
    "quantized": (lambda: {"a": torch.quantize_per_tensor(BASE, 1.0, 0, torch.qint8)}, "dtype torch.qint8"),
    "expanded": (lambda: {"a": torch.ones(1).expand(HUGE, HUGE)}, "repeats its elements"),
    "negated": (lambda: {"a": torch.ones(2, dtype=torch.complex64).conj().imag}, "negated"),
    "bytes": (lambda: {"a": BASE.char()}, "torch.int8; accepted: F64, F32, F16, BF16, I64, I32, I16, U8"),
    "complex": (lambda: {"a": BASE.cfloat()}, "dtype torch.complex64"),
    "nested": (lambda: {"state_dict": {"a": BASE}}, "'state_dict' that is of type dict, not a tensor"),
    "list": (lambda: [BASE], "holds a list, not a dict"),
    "tensor": (lambda: BASE, "holds a Tensor, not a dict"),
    "number": (lambda: {"a": BASE, "step": 3}, "'step' that is of type int"),
    "module": (lambda: {"a": nn.Linear(1, 1)}, "refers to 'torch.nn.modules.linear.Linear'"),
    "number as name": (lambda: {1: BASE}, "a key of type int"),
    "long name": (lambda: {"x" * 1000: BASE}, "names have 1 to 512"),
    "control characters": (lambda: {"a\x1b[31m\n": BASE}, r"'a\x1b[31m\n'"),
    "metadata": (lambda: {"__metadata__": BASE}, "names a tensor '__metadata__'"),
    "100k tensors": (lambda: {str(i): BASE[i] for i in range(len(BASE))}, "has 100000 tensors"),
    "many times nearly the same": (
        lambda: {str(i): BASE[i:] for i in range(50)},
        "together claim more bytes",
    ),
}


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("case", NOT_PLAIN)
def test_only_flat_dicts_of_dense_floats(tmp_path: Path, case: str) -> None:
    content, problem = NOT_PLAIN[case]
    torch.save(content(), tmp_path / NAME)
    assert problem in refused(tmp_path / NAME)


def test_a_tensor_with_many_names_is_written_once_and_not_read_more_often(tmp_path: Path) -> None:
    torch.save({f"name.{i}": BASE for i in range(50)}, tmp_path / NAME)
    files = files_in(tmp_path)
    assert len(files.header(NAME).tensors) == 50
    assert torch.equal(files.tensors(NAME, ["name.7"])["name.7"], BASE)
    with pytest.raises(InvalidDelta, match="together claim more bytes"):
        files.tensors(NAME, ["name.0", "name.1"])
    (written,) = tmp_path.glob("converted-*/*.safetensors")
    assert written.stat().st_size < 2 * BASE.numel() * BASE.itemsize


@pytest.mark.parametrize(
    ("numel", "size", "stride"),
    [
        (1 << 40, (1 << 40,), (1,)),  # more than the record, which has 4 floats
        (4, (2,), (1 << 40,)),
        (4, (1 << 32, 1 << 32), (0, 0)),  # 2**64 elements
        (-4, (4,), (1,)),
        (4, (-4,), (1,)),
        (4, (4,), (-1,)),
    ],
)
def test_storages_shapes_and_strides_that_do_not_fit(
    tmp_path: Path, numel: int, size: tuple[int, ...], stride: tuple[int, ...]
) -> None:
    assert refused(forged(tmp_path / NAME, numel, size, stride, struct.pack("<4f", 1, 2, 3, 4)))


def test_the_forger_can_be_honest(tmp_path: Path) -> None:
    path = forged(tmp_path / NAME, 4, (2, 2), (1, 2), struct.pack("<4f", 1, 2, 3, 4))
    assert converted(path)["a"].tolist() == [[1, 3], [2, 4]]
