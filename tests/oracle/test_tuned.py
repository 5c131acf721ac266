"""Where our training begins and what its gradients are, beside PEFT on the same backbone."""

from __future__ import annotations

from functools import cache
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltas.delta import Delta
from deltas.patches import Gain, LowRank, Patch, Shift
from deltas.tuned import TUNABLE
from tests.oracle.padded import PaddedRow, PaddedRunner
from tests.oracle.peft_reference import FAMILIES, ROWS, backbone_logits, fresh_backbone, logits, quiet
from tests.tunables import begin

TOLERANCE = 1e-5
MOVES_AT_ONCE = {"head", "masking", "prefix", "prompt"}
LORAS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({"rank": 4, "alpha": 12}, {"r": 4, "lora_alpha": 12}),
    "rslora": ({"rank": 4, "alpha": 12, "rslora": True}, {"r": 4, "lora_alpha": 12, "use_rslora": True}),
    "dora": ({"rank": 4, "alpha": 12, "dora": True}, {"r": 4, "lora_alpha": 12, "use_dora": True}),
}


@cache
def runner(family: str) -> PaddedRunner:
    return PaddedRunner(family)


def ours(family: str, delta: Delta) -> list[Tensor]:
    placed = runner(family).place(delta)
    return runner(family).logits([PaddedRow(row.ids, placed, row.decoder_ids or None) for row in ROWS])


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "t5"])
@pytest.mark.parametrize("name", sorted(TUNABLE.keys() - MOVES_AT_ONCE))
def test_training_begins_at_the_backbone(name: str, family: str) -> None:
    begun = begin(name, family)
    component = begun.method.component(begun.parameters, begun.options, begun.sites, begun.weights)
    for found, own in zip(ours(family, Delta((component,))), backbone_logits(family), strict=True):
        assert torch.allclose(found, own, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("kind", LORAS)
def test_a_lora_begins_as_pefts(kind: str) -> None:
    mine, theirs = LORAS[kind]
    begun = begin("lora", "llama", mine, targets=["q_proj", "down_proj"])
    layer = _peft_linear("llama", peft.LoraConfig(target_modules=["q_proj", "down_proj"], **theirs))
    component = begun.method.component(begun.parameters, begun.options, begun.sites, begun.weights)
    assert component.config["scale"] == layer.scaling["default"]
    first, second = begun.parameters["layers.0.attn.q/A"], layer.lora_A["default"].weight
    assert first.shape == second.shape
    bound = 1 / first.shape[1] ** 0.5
    for factor in (first, second):
        assert bool((factor.abs() <= bound).all())
        assert abs(float(factor.detach().std()) * 3**0.5 / bound - 1) < 0.2  # uniform within the bound
    for factor in (begun.parameters["layers.0.attn.q/B"], layer.lora_B["default"].weight):
        assert not bool(factor.any())
    if kind == "dora":
        magnitude = layer.lora_magnitude_vector["default"].weight
        assert torch.allclose(begun.parameters["layers.0.attn.q/magnitude"], magnitude, atol=1e-6)


@pytest.mark.parametrize("family", ["llama", "bert"])
@pytest.mark.parametrize("kind", LORAS)
def test_gradients_are_pefts(kind: str, family: str) -> None:
    """Through one linear, with and without a bias of its own: DoRA's norms are constants in both."""
    mine, theirs = LORAS[kind]
    target = FAMILIES[family].linears[0]
    layer = _peft_linear(family, peft.LoraConfig(target_modules=[target], **theirs), target)
    begun = begin("lora", family, mine, moved=0.2, targets=[target])
    site = begun.sites[0].name
    pairs = {f"{site}/A": layer.lora_A["default"].weight, f"{site}/B": layer.lora_B["default"].weight}
    if kind == "dora":
        pairs[f"{site}/magnitude"] = layer.lora_magnitude_vector["default"].weight
    for name, other in pairs.items():
        other.data.copy_(begun.parameters[name].data)
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(7, begun.sites[0].in_features, generator=generator)
    wanted = torch.randn(7, begun.sites[0].out_features, generator=generator)
    found = _applied(
        begun.patches(), site, x, begun.weights.weight(begun.sites[0]), begun.weights.bias(begun.sites[0])
    )
    expected = layer(x)
    assert torch.allclose(found, expected, atol=TOLERANCE)
    for output in (found, expected):
        F.mse_loss(output, wanted).backward()  # type: ignore[no-untyped-call]
    for name, other in pairs.items():
        gradient = begun.parameters[name].grad
        assert gradient is not None
        assert other.grad is not None
        assert torch.allclose(gradient, other.grad, atol=TOLERANCE), name


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_prompt_of_a_text_is_pefts(family: str) -> None:
    """The embeddings of these tokens, repeated, in PEFT's model give what ours give."""
    tokens = [7, 9, 11]
    begun = begin("prompt", family, {"length": 5, "init": "text", "init_tokens": tokens})
    component = begun.method.component(begun.parameters, begun.options, begun.sites, begun.weights)
    with quiet():
        model = peft.get_peft_model(
            fresh_backbone(FAMILIES[family]),
            peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5),
        )
    words = model.get_input_embeddings()(torch.tensor([7, 9, 11, 7, 9]))
    model.prompt_encoder["default"].embedding.weight.data.copy_(words)
    for found, row in zip(ours(family, Delta((component,))), ROWS, strict=True):
        assert torch.allclose(found, logits(model.eval(), row), atol=TOLERANCE)


def _peft_linear(family: str, config: peft.PeftConfig, target: str = "q_proj") -> Any:
    torch.manual_seed(0)
    with quiet():
        model = peft.get_peft_model(fresh_backbone(FAMILIES[family]), config)
    layers: list[nn.Module] = [m for n, m in model.named_modules() if n.endswith(f".{target}")]
    return layers[0].eval()


def _applied(patches: list[Patch], site: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """What the patches make of one linear, by their definition."""
    y = F.linear(x, weight, bias)
    here = [patch for patch in patches if getattr(patch, "site", "") == site]
    for patch in here:
        if isinstance(patch, Gain):
            y = y * patch.gain
    for patch in here:
        if isinstance(patch, LowRank):
            y = y + x @ patch.down.T @ patch.up
        elif isinstance(patch, Shift):
            y = y + patch.beta
    return y
