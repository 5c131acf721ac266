"""Gradients of whole weights are Hugging Face's own: windows, capped scores, and an encoder whose positions begin late."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM

from server.engine import backbone as backbones
from server.tuning.forward import Passes
from server.tuning.run import Run
from server.tuning.spec import Example, MethodSpec, Task
from tests import tuning
from tests.oracle.padded import BACKBONES
from tests.unit.backbones import tiny

Row = Callable[[Example], Tensor]


def gradients(folder: Path, scratch: Path, task: Task, more: list[Any], theirs: Any, loss: Row) -> None:
    """Of every linear's weight in the layers; rows are longer than a window, and packed here."""
    passes = Passes(backbones.load(folder.name, folder, torch.device("cpu"), torch.float32))
    methods: list[MethodSpec] = [tuning.method(passes, "selective_module", targets=["linears"])]
    methods += [make(passes) for make in more]
    rows = tuning.examples(task, 4, longest=24)
    spec = tuning.job(scratch, methods, task, rows, batch_size=4)
    run = Run.open(spec, scratch, passes)
    part = run.part()
    run.loss(passes([part])[0]).backward()  # type: ignore[no-untyped-call]
    head = {name: p for name, p in run.parameters.items() if name.startswith("1/")}
    theirs.head = {name.rpartition("/")[2]: p.detach().clone() for name, p in head.items()}
    torch.stack([loss(row) for row in part.examples]).mean().backward()  # type: ignore[no-untyped-call]
    weights = dict(theirs.named_parameters())
    checked = 0
    for name, found in run.parameters.items():
        site, _, what = name.partition("/")[2].rpartition("/")
        if name.startswith("0/") and what == "matrix":
            path = passes.backbone.spec.sites[site].path.removeprefix("roberta.")
            torch.testing.assert_close(found.grad, weights[f"{path}.weight"].grad, rtol=1e-4, atol=1e-5)
            checked += 1
    assert checked >= 4 * tiny.LAYERS


@pytest.mark.parametrize("name", ["mistral windowed", "qwen3 windowed", "gemma2", "gemma3_text"])
def test_decoders(name: str, tmp_path: Path) -> None:
    folder = tiny.save(name, tmp_path)
    theirs: Any = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()

    def loss(row: Example) -> Tensor:
        ((start, stop),) = row.learn
        logits = theirs(input_ids=torch.tensor([row.tokens])).logits[0, start - 1 : stop - 1]
        return F.cross_entropy(logits, torch.tensor(row.tokens[start:stop]))

    gradients(folder, tmp_path / "job", "generate", [], theirs, loss)


def test_roberta(tmp_path: Path) -> None:
    folder = BACKBONES / "roberta"
    theirs: Any = AutoModel.from_pretrained(
        folder, attn_implementation="eager", add_pooling_layer=False
    ).eval()

    def loss(row: Example) -> Tensor:
        hidden = theirs(input_ids=torch.tensor([row.tokens])).last_hidden_state[0].mean(0)
        scores = F.linear(hidden, theirs.head["weight"], theirs.head["bias"])
        assert isinstance(row.label, int)
        return F.cross_entropy(scores, torch.tensor(row.label))

    gradients(
        folder, tmp_path / "job", "classify", [lambda passes: tuning.head(passes, "classify")], theirs, loss
    )
