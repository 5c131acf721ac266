"""Bottlenecks that AdapterHub's own library saved give its own logits; other configurations are refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaForCausalLM

from deltas.backbones import describe
from deltas.errors import DeltaError, InvalidDelta, UnsupportedDelta
from deltas.formats import DeltaFiles, read
from deltas.methods import lower, rank
from deltas.patches import BlockInput, Bottleneck
from deltas.sites import BackboneSpec

FIXTURES = Path(__file__).parents[2] / "oracle" / "fixtures" / "adapterhub"
CONFIG, WEIGHTS = "adapter_config.json", "adapter.safetensors"
READABLE = [
    "seq_bn",
    "seq_bn_headless",
    "seq_bn_leave_out",
    "double_seq_bn",
    "double_seq_bn_by_layer",
    "par_bn",
    "par_bn_gelu",
]


@pytest.fixture(scope="module")
def backbone() -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(FIXTURES / "backbone", dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def spec(backbone: LlamaForCausalLM) -> BackboneSpec:
    return describe(backbone.config, "fixture")


def files_in(folder: Path) -> DeltaFiles:
    return DeltaFiles({path.name: path for path in folder.iterdir()})


@pytest.mark.parametrize("case", READABLE)
def test_gives_the_librarys_logits(
    case: str, backbone: LlamaForCausalLM, spec: BackboneSpec, apply: Callable[..., Tensor]
) -> None:
    expected = load_file(FIXTURES / "expected.safetensors")
    delta = read(files_in(FIXTURES / case), spec)
    assert (delta.format, delta.methods) == ("adapterhub", ["bottleneck"])
    patches = lower(delta, spec)
    for prompt in range(3):
        ids, wanted = expected[f"ids.{prompt}"], expected[f"{case}.{prompt}"]
        assert (wanted - expected[f"base.{prompt}"]).abs().max() > 1e-2
        got = apply(backbone, spec, patches, ids)
        assert (got - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def test_the_same_adapter_from_another_head_has_the_same_digest(spec: BackboneSpec) -> None:
    digests = {read(files_in(FIXTURES / case), spec).digest for case in ("seq_bn", "seq_bn_headless")}
    assert len(digests) == 1


def test_widths_and_places(spec: BackboneSpec) -> None:
    by_layer = read(files_in(FIXTURES / "double_seq_bn_by_layer"), spec)
    assert rank(by_layer) == 12
    patches = [patch for patch in lower(by_layer, spec) if isinstance(patch, Bottleneck)]
    assert [len(patch.down) for patch in patches] == [12, 12, 4, 4, 1, 1]
    assert patches[0].site == "layers.0.attn.out"
    assert {patch.reads for patch in patches} == {BlockInput.OUTPUT}
    left_out = read(files_in(FIXTURES / "seq_bn_leave_out"), spec)
    assert left_out.components[0].sites() == ["layers.0.mlp.out", "layers.2.mlp.out"]


def test_heads_are_refused_by_name(spec: BackboneSpec) -> None:
    with pytest.raises(UnsupportedDelta) as caught:
        read(files_in(FIXTURES / "seq_bn_with_head"), spec)
    assert caught.value.field == "model_head.safetensors"


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A copy of the ``double_seq_bn`` fixture."""
    for name in (CONFIG, WEIGHTS):
        shutil.copyfile(FIXTURES / "double_seq_bn" / name, tmp_path / name)
    return tmp_path


def change(folder: Path, where: str, value: Any) -> None:
    config = json.loads((folder / CONFIG).read_text())
    *outer, key = where.split(".")
    (config[outer[0]] if outer else config)[key] = value
    (folder / CONFIG).write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("where", "value"),
    [
        ("config.use_gating", True),
        ("config.inv_adapter", "glow"),
        ("config.invertible_adapter", {"block_type": "nice", "reduction_factor": 2}),
        ("config.cross_adapter", True),
        ("config.residual_before_ln", "post_add"),
        ("config.residual_before_ln", 1),
        ("config.original_ln_after", False),
        ("config.non_linearity", "prelu"),
        ("config.non_linearity", "gelu_orig"),
        ("config.architecture", "reft"),
        ("config.architecture", "later"),
        ("config.architecture", ["union"]),
        ("config.later_option", None),
        ("later_option", 1),
        ("model_type", "bert"),
    ],
)
def test_other_mathematics_is_refused_by_name(
    saved: Path, spec: BackboneSpec, where: str, value: Any
) -> None:
    change(saved, where, value)
    with pytest.raises(UnsupportedDelta) as caught:
        read(files_in(saved), spec)
    assert caught.value.field == where.rpartition(".")[2]


@pytest.mark.parametrize(
    ("key", "value", "missing"),
    [
        ("ln_before", True, "adapter_down.0.weight"),
        ("ln_after", True, "adapter_norm_after.weight"),
        ("inv_adapter", "nice", "invertible_adapters.support-tone.F.0.weight"),
        ("phm_layer", True, "adapter_down.0.W_left"),
        ("scaling", "learned", "scaling"),
        ("scaling", "channel", "scaling"),
        ("architecture", "lora", "loras.support-tone.lora_A"),
        ("architecture", "prefix_tuning", "prefix_tunings.support-tone.self_prefix.wte.weight"),
    ],
)
def test_options_need_their_tensors(
    saved: Path, spec: BackboneSpec, key: str, value: Any, missing: str
) -> None:
    change(saved, f"config.{key}", value)
    if key == "architecture":
        config = json.loads((saved / CONFIG).read_text())
        (saved / CONFIG).write_text(json.dumps(config | {"config": {"architecture": value}}))
    with pytest.raises(InvalidDelta) as caught:
        read(files_in(saved), spec)
    assert caught.value.field is not None
    if key == "ln_before":  # the file's linear is where the norm should be
        assert caught.value.field.endswith("adapter_down.1.weight")
    else:
        assert caught.value.field.endswith(missing)


@pytest.mark.parametrize(
    ("where", "value"),
    [
        ("hidden_size", 32),
        ("hidden_size", None),
        ("name", None),
        ("config", None),
        ("config", "seq_bn"),
        ("config.reduction_factor", 16),
        ("config.reduction_factor", 0),
        ("config.reduction_factor", -8),
        ("config.reduction_factor", 1e-300),
        ("config.reduction_factor", {"0": 8}),
        ("config.reduction_factor", {"default": "8"}),
        ("config.reduction_factor", None),
        ("config.leave_out", 1),
        ("config.leave_out", [True]),
        ("config.leave_out", ["1"]),
        ("config.non_linearity", None),
        ("config.scaling", None),
        ("config.scaling", "trained"),
    ],
)
def test_configs_that_do_not_fit_are_refused(saved: Path, spec: BackboneSpec, where: str, value: Any) -> None:
    change(saved, where, value)
    with pytest.raises(InvalidDelta) as caught:
        read(files_in(saved), spec)
    assert caught.value.field == where.rpartition(".")[2]


def test_the_tensors_must_be_those_the_config_promises(saved: Path, spec: BackboneSpec) -> None:
    original = load_file(saved / WEIGHTS)
    stem = "model.layers.1.output_adapters.adapters.support-tone"
    up, down = f"{stem}.adapter_up.weight", f"{stem}.adapter_down.0.weight"
    cases: dict[str, tuple[dict[str, Tensor | None], str]] = {
        "missing": ({up: None}, up),
        "unknown": ({"model.norm.weight": torch.ones(64)}, "model.norm.weight"),
        "another adapter": (
            {up.replace("support-tone", "x"): original[up].clone()},
            up.replace("support-tone", "x"),
        ),
        "beyond the layers": ({up.replace(".1.", ".7."): original[up].clone()}, up.replace(".1.", ".7.")),
        "swapped": ({up: original[up].T.contiguous()}, up),
        "narrow": ({down: original[down][:4].clone()}, "reduction_factor"),
        "nan": ({up: original[up] * torch.nan}, up),
        "bias": ({f"{stem}.adapter_up.bias": torch.zeros(1)}, f"{stem}.adapter_up.bias"),
    }
    for name, (changes, field) in cases.items():
        tensors = {key: value for key, value in (original | changes).items() if value is not None}
        save_file(tensors, saved / WEIGHTS)
        with pytest.raises(InvalidDelta) as caught:
            read(files_in(saved), spec)
        assert caught.value.field == field, name
    save_file(original, saved / WEIGHTS)
    for flag in ("mh_adapter", "output_adapter"):
        change(saved, f"config.{flag}", False)
        with pytest.raises(DeltaError):
            read(files_in(saved), spec)
    with pytest.raises(InvalidDelta, match="places no adapter"):
        read(files_in(saved), spec)
    change(saved, "config.output_adapter", True)
    with pytest.raises(InvalidDelta, match="mean nothing"):
        read(files_in(saved), spec)


def test_what_changes_nothing_is_accepted(saved: Path, spec: BackboneSpec) -> None:
    before = read(files_in(saved), spec).digest
    for where, value in {
        "config.dropout": 0.5,
        "config.init_weights": "mam_adapter",
        "config.phm_dim": 8,
        "config.stochastic_depth": 0.1,
        "config.non_linearity": "SiLU",
        "config.leave_out": [9],
        "model_class": "Other",
        "config.residual_before_ln": False,
    }.items():
        change(saved, where, value)
        assert read(files_in(saved), spec).digest == before, where


def test_gelu_means_gelu_new_without_a_version(saved: Path, spec: BackboneSpec) -> None:
    def activation(name: str) -> str:
        change(saved, "config.non_linearity", name)
        return str(read(files_in(saved), spec).components[0].config["activation"])

    assert activation("gelu") == "gelu"
    config = json.loads((saved / CONFIG).read_text())
    del config["version"]
    (saved / CONFIG).write_text(json.dumps(config))
    assert activation("gelu") == "gelu_tanh"
    assert activation("gelu_orig") == "gelu"


@pytest.mark.parametrize(
    ("before", "after", "residual", "reads", "onto"),
    [
        (True, True, True, BlockInput.OUTPUT_AND_RESIDUAL, None),
        (True, False, False, BlockInput.OUTPUT_AND_RESIDUAL, None),
        (False, True, True, BlockInput.OUTPUT, None),
        (False, True, False, BlockInput.OUTPUT, None),
        (True, True, False, BlockInput.OUTPUT_AND_RESIDUAL, "output+residual"),
        (True, False, True, None, None),
        (False, False, True, None, None),
        (False, False, False, None, None),
    ],
)
def test_only_sums_that_keep_the_residual_are_served(
    saved: Path,
    spec: BackboneSpec,
    before: bool,
    after: bool,
    residual: bool,
    reads: BlockInput | None,
    onto: str | None,
) -> None:
    change(saved, "config.original_ln_before", before)
    change(saved, "config.original_ln_after", after)
    change(saved, "config.residual_before_ln", residual)
    if reads is None:
        with pytest.raises(UnsupportedDelta, match="residual"):
            read(files_in(saved), spec)
    else:
        config = read(files_in(saved), spec).components[0].config
        assert (config["reads"], config.get("onto")) == (reads, onto)
