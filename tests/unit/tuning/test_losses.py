"""Losses are torch's own: smoothed, weighted, divided by what counts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from deltas.tuned import tunable
from server.tuning import losses
from server.tuning.forward import Generated, Part, Scored
from server.tuning.spec import Example, JobSpec, Task
from tests import tuning
from tests.oracle.padded import BACKBONES

WEIGHTS = [0.5, 2.0, 1.0]


def job(task: Task, smoothing: float = 0.0, weights: list[float] | None = None) -> JobSpec:
    return JobSpec(
        id="j",
        tenant="t",
        name="n",
        task=task,
        methods=[],
        labels=["a", "b", "c"],
        label_smoothing=smoothing,
        class_weights=weights,
    )


@pytest.mark.parametrize("weights", [None, WEIGHTS])
@pytest.mark.parametrize("task", ["classify", "tag"])
def test_classes(task: Task, weights: list[float] | None) -> None:
    scores = torch.randn(6, 3, generator=torch.Generator().manual_seed(1))
    labels = [0, 2, 1, -100, 1, 2] if task == "tag" else [0, 2, 1, 0, 1, 2]
    rows = [Example([5], label=label) for label in labels]
    if task == "tag":
        rows = [Example([5] * 4, label=labels[:4]), Example([5] * 2, label=labels[4:])]
    tensor = None if weights is None else torch.tensor(weights)
    for smoothing in (0.0, 0.2):
        spec = job(task, smoothing, weights)
        wanted = F.cross_entropy(
            scores, torch.tensor(labels), weight=tensor, label_smoothing=smoothing, reduction="sum"
        )
        torch.testing.assert_close(losses.total(spec, rows, Scored(scores)), wanted)
    mean = losses.total(job(task, 0.0, weights), rows, Scored(scores)) / losses.weight(
        spec, rows, "encoder", 0
    )
    torch.testing.assert_close(mean, F.cross_entropy(scores, torch.tensor(labels), weight=tensor))


@pytest.mark.parametrize("targets", [["q"], ["head"]])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_smoothed_tokens(targets: list[str], smoothing: float) -> None:
    """With the backbone's own output head, and with one that is trained: the gradients too."""
    passes = tuning.passes_of("llama")
    method = tuning.method(passes, "bitfit", targets=targets)
    sites = [passes.backbone.spec.sites[name] for name in method.targets]
    draw = torch.Generator().manual_seed(2)
    shifts = {
        f"{site.name}/beta": (torch.randn(site.out_features, generator=draw) * 0.3).requires_grad_()
        for site in sites
    }
    patches = tunable("bitfit").patches(shifts, method.options, sites, passes.weights, None)
    rows = tuning.examples("generate", 5)
    (output,) = passes([Part("generate", rows, passes.bind(patches), smoothing)])
    assert isinstance(output, Generated)
    output.losses.sum().backward()  # type: ignore[no-untyped-call]
    ours = [shift.grad for shift in shifts.values()]
    plain: Any = AutoModelForCausalLM.from_pretrained(BACKBONES / "llama").requires_grad_(False)
    own = [shift.detach().clone().requires_grad_() for shift in shifts.values()]
    for site, shift in zip(sites, own, strict=True):
        plain.get_submodule(site.path).register_forward_hook(lambda _m, _a, out, by=shift: out + by)
    expected = []
    for row in rows:
        ((start, stop),) = row.learn
        logits = plain(input_ids=torch.tensor([row.tokens[:-1]])).logits[0, start - 1 :]
        wanted = torch.tensor(row.tokens[start:stop])
        expected.append(F.cross_entropy(logits, wanted, reduction="none", label_smoothing=smoothing))
    torch.testing.assert_close(output.losses, torch.cat(expected), rtol=1e-5, atol=1e-5)
    torch.cat(expected).sum().backward()  # type: ignore[no-untyped-call]
    for found, shift in zip(ours, own, strict=True):
        torch.testing.assert_close(found, shift.grad, rtol=1e-4, atol=1e-5)
