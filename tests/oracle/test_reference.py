"""The plain PyTorch reference against what AdapterHub's own library computed, and against real biases."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from tests.oracle.make_deltas import random_shifts, write_bottleneck
from tests.oracle.reference import bitfit, bottleneck, greedy, logits, read_adapter

FIXTURES = Path(__file__).parent / "fixtures" / "adapterhub"
INDEX = json.loads((FIXTURES / "index.json").read_text(encoding="utf-8"))
CASES = sorted(INDEX["cases"])
PROMPTS = range(INDEX["prompts"])
EXPECTED = load_file(FIXTURES / "expected.safetensors")


@pytest.fixture(scope="module")
def backbone() -> LlamaForCausalLM:
    model = LlamaForCausalLM.from_pretrained(FIXTURES / "backbone", dtype=torch.float32)
    return model.eval()


def distance(got: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the largest expected value."""
    assert got.shape == expected.shape
    return float((got - expected).abs().max() / expected.abs().max())


def edited(source: Path, folder: Path, **options: object) -> Path:
    """A copy of an adapter folder with other options in its config."""
    shutil.copytree(source, folder)
    path = folder / "adapter_config.json"
    record = json.loads(path.read_text(encoding="utf-8"))
    record["config"] |= options
    path.write_text(json.dumps(record), encoding="utf-8")
    return folder


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("case", CASES)
def test_bottleneck_equals_the_library(backbone: LlamaForCausalLM, case: str, prompt: int) -> None:
    ids = EXPECTED[f"ids.{prompt}"]
    base = EXPECTED[f"base.{prompt}"]
    with bottleneck(backbone, FIXTURES / case):
        got = logits(backbone, ids)
    assert distance(got, EXPECTED[f"{case}.{prompt}"]) < 1e-5
    assert distance(got, base) > 0.1
    assert distance(logits(backbone, ids), base) < 1e-5  # the hooks are gone


@pytest.mark.parametrize("case", ["seq_bn", "double_seq_bn", "par_bn"])
def test_every_tensor_matters(backbone: LlamaForCausalLM, case: str, tmp_path: Path) -> None:
    """So agreement means that each tensor was put in its own place."""
    folder = shutil.copytree(FIXTURES / case, tmp_path / case)
    tensors = load_file(FIXTURES / case / "adapter.safetensors")
    for key, tensor in tensors.items():
        save_file(tensors | {key: torch.zeros_like(tensor)}, folder / "adapter.safetensors")
        with bottleneck(backbone, folder):
            got = logits(backbone, EXPECTED["ids.2"])
        assert distance(got, EXPECTED[f"{case}.2"]) > 1e-3, key


@pytest.mark.parametrize(
    ("case", "options"),
    [
        ("seq_bn", {"original_ln_before": False}),
        ("seq_bn", {"is_parallel": True}),
        ("seq_bn", {"non_linearity": "swish"}),
        ("double_seq_bn", {"original_ln_before": True}),
        ("double_seq_bn", {"non_linearity": "relu"}),
        ("par_bn", {"is_parallel": False}),
        ("par_bn", {"scaling": 1.0}),
        ("par_bn_gelu", {"non_linearity": "gelu_new"}),
    ],
)
def test_other_mathematics_would_be_seen(
    backbone: LlamaForCausalLM, case: str, options: dict[str, object], tmp_path: Path
) -> None:
    with bottleneck(backbone, edited(FIXTURES / case, tmp_path / case, **options)):
        got = logits(backbone, EXPECTED["ids.2"])
    assert distance(got, EXPECTED[f"{case}.2"]) > 1e-4


def test_what_the_reference_cannot_do_is_an_error(backbone: LlamaForCausalLM, tmp_path: Path) -> None:
    with (
        pytest.raises(ValueError, match="ln_after"),
        bottleneck(backbone, edited(FIXTURES / "seq_bn", tmp_path / "option", ln_after=True)),
    ):
        pass
    with (
        pytest.raises(ValueError, match="left over"),
        bottleneck(backbone, edited(FIXTURES / "seq_bn", tmp_path / "more", leave_out=[0])),
    ):
        pass
    with (
        pytest.raises(ValueError, match="lacks"),
        bottleneck(backbone, edited(FIXTURES / "seq_bn", tmp_path / "fewer", mh_adapter=True)),
    ):
        pass
    assert distance(logits(backbone, EXPECTED["ids.0"]), EXPECTED["base.0"]) < 1e-5


def test_greedy_agrees_with_uncached_logits(backbone: LlamaForCausalLM) -> None:
    with bottleneck(backbone, FIXTURES / "double_seq_bn"):
        prompt = EXPECTED["ids.1"].tolist()
        chosen = greedy(backbone, prompt, 6)
        whole = logits(backbone, prompt + chosen)
    assert whole[len(prompt) - 1 : -1].argmax(dim=-1).tolist() == chosen


class ShiftedNorm(nn.Module):
    """A norm whose output has a bias: what BitFit means where the backbone has none."""

    def __init__(self, norm: nn.Module, beta: Tensor) -> None:
        super().__init__()
        self.norm, self.beta = norm, beta

    def forward(self, hidden: Tensor) -> Tensor:
        shifted: Tensor = self.norm(hidden) + self.beta
        return shifted


def test_bitfit_equals_real_biases(backbone: LlamaForCausalLM) -> None:
    shifts = random_shifts(backbone, seed=3, scale=10.0)
    assert len(shifts) == 3 * 9 + 1
    biased = LlamaForCausalLM.from_pretrained(FIXTURES / "backbone", dtype=torch.float32).eval()
    for path, beta in shifts.items():
        module = biased.get_submodule(path)
        if isinstance(module, nn.Linear):
            module.bias = nn.Parameter(beta.clone())
        else:
            parent, _, name = path.rpartition(".")
            setattr(biased.get_submodule(parent), name, ShiftedNorm(module, beta))
    ids = EXPECTED["ids.2"]
    expected = logits(biased, ids)
    with bitfit(backbone, shifts):
        got = logits(backbone, ids)
    assert distance(got, expected) < 1e-5
    assert distance(got, EXPECTED["base.2"]) > 0.1
    assert distance(logits(backbone, ids), EXPECTED["base.2"]) < 1e-5


def test_bitfit_refuses_a_wrong_shape(backbone: LlamaForCausalLM) -> None:
    with pytest.raises(ValueError, match="shape"), bitfit(backbone, {"model.norm": torch.zeros(3)}):
        pass


@pytest.mark.parametrize(
    ("case", "kind", "options"),
    [
        ("seq_bn", "seq_bn", {"reduction_factor": 16}),
        ("double_seq_bn", "double_seq_bn", {"reduction_factor": 8}),
        ("double_seq_bn_bin", "double_seq_bn", {"reduction_factor": 8, "form": "bin"}),
        ("par_bn", "par_bn", {"reduction_factor": 4}),
        ("seq_bn_leave_out", "seq_bn", {"reduction_factor": 8, "leave_out": [1]}),
        ("double_seq_bn_by_layer", "double_seq_bn", {"reduction_factor": {"0": 5, "2": 100, "default": 16}}),
    ],
)
def test_written_bottlenecks_look_like_the_librarys(
    backbone: LlamaForCausalLM, case: str, kind, options, tmp_path: Path
) -> None:
    name = INDEX["cases"][case]["name"]
    made = write_bottleneck(tmp_path, backbone.config, kind, name=name, seed=1, **options)
    config, tensors = read_adapter(tmp_path)
    theirs, their_tensors = read_adapter(FIXTURES / case)
    assert config == theirs
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in (FIXTURES / case).iterdir()}
    assert {key: (t.shape, t.dtype) for key, t in tensors.items()} == {
        key: (t.shape, t.dtype) for key, t in their_tensors.items()
    }
    assert all(torch.equal(tensors[key], tensor) for key, tensor in made.items())
    with bottleneck(backbone, tmp_path):
        assert distance(logits(backbone, EXPECTED["ids.1"]), EXPECTED["base.1"]) > 1e-3
