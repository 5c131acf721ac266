"""A LoRA job's loss, gradients and steps, beside PEFT's own on the same model: padded there, packed here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from server.tuning.forward import Passes
from server.tuning.messages import Stepped
from server.tuning.run import Run
from server.tuning.schedule import factor
from server.tuning.spec import Example, JobSpec
from server.tuning.trainer import Trainer
from tests import tuning
from tests.oracle.padded import BACKBONES

PROJECTIONS = {"llama": ("q_proj", "v_proj"), "bert": ("query", "value")}
FACTORS = {"A": "lora_A.default.weight", "B": "lora_B.default.weight"}
RATE = 1e-2


def padded(rows: list[Example]) -> tuple[Tensor, Tensor]:
    longest = max(len(row.tokens) for row in rows)
    ids = torch.tensor([row.tokens + [0] * (longest - len(row.tokens)) for row in rows])
    mask = torch.tensor([[1] * len(row.tokens) + [0] * (longest - len(row.tokens)) for row in rows])
    return ids, mask


class Decoder:
    """The mean loss of completion tokens."""

    task = "generate"

    def __init__(self) -> None:
        base = AutoModelForCausalLM.from_pretrained(BACKBONES / "llama")
        self.model = peft.get_peft_model(base, config("llama"))

    def loss(self, rows: list[Example]) -> Tensor:
        ids, mask = padded(rows)
        labels = torch.full_like(ids, -100)
        for n, row in enumerate(rows):
            for start, stop in row.learn:
                labels[n, start:stop] = ids[n, start:stop]
        loss: Tensor = self.model(input_ids=ids, attention_mask=mask, labels=labels).loss
        return loss


class Encoder:
    """A linear on the first token's state: the model's own pooler is none of ours."""

    task = "classify"

    def __init__(self) -> None:
        base = AutoModelForSequenceClassification.from_pretrained(BACKBONES / "bert", num_labels=3)
        self.model = peft.get_peft_model(base.bert, config("bert"))
        self.head = torch.nn.Linear(base.config.hidden_size, 3)

    def loss(self, rows: list[Example]) -> Tensor:
        ids, mask = padded(rows)
        hidden = self.model(input_ids=ids, attention_mask=mask).last_hidden_state[:, 0]
        return F.cross_entropy(self.head(hidden), torch.tensor([row.label for row in rows]))


def config(family: str) -> peft.LoraConfig:
    return peft.LoraConfig(r=4, lora_alpha=8, target_modules=list(PROJECTIONS[family]))


class Pair:
    """The same start on both sides: what a name of ours is there."""

    def __init__(self, family: str, folder: Path) -> None:
        self.passes: Passes = tuning.passes_of(family)
        self.theirs: Any = Decoder() if family == "llama" else Encoder()
        lora = tuning.method(self.passes, "lora", rank=4, alpha=8.0, targets=PROJECTIONS[family])
        methods = [lora]
        if family == "bert":
            methods.append(tuning.method(self.passes, "head", labels=tuning.LABELS, pooling="first"))
        self.rows = tuning.examples(self.theirs.task, 20, longest=14)
        self.spec: JobSpec = tuning.job(
            folder, methods, self.theirs.task, self.rows, learning_rate=RATE, max_grad_norm=None, warmup=0.2
        )
        self.run = Run.open(self.spec, folder, self.passes)
        self.named = {name: self._theirs(name) for name in self.run.parameters}
        make = torch.Generator().manual_seed(3)
        with torch.no_grad():  # a LoRA that begins with zeros has no gradient in its other factor
            for name, own in self.run.parameters.items():
                own.copy_(torch.randn(own.shape, generator=make) * 0.3)
                self.named[name].copy_(own)

    def _theirs(self, name: str) -> Tensor:
        site, _, parameter = name.partition("/")[2].rpartition("/")
        if site.startswith("layers.") and parameter in FACTORS:
            path = self.passes.backbone.spec.sites[site].path
            if isinstance(self.theirs, Encoder):
                path = path.removeprefix("bert.")
            return dict(self.theirs.model.named_parameters())[f"base_model.model.{path}.{FACTORS[parameter]}"]
        return dict(self.theirs.head.named_parameters())[parameter]


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_loss_and_gradients(family: str, tmp_path: Path) -> None:
    pair = Pair(family, tmp_path / "job")
    part = pair.run.part()
    (output,) = pair.passes([part])
    own = pair.run.loss(output)
    own.backward()
    theirs = pair.theirs.loss(list(part.examples))
    theirs.backward()
    torch.testing.assert_close(own, theirs, rtol=1e-5, atol=1e-6)
    for name, parameter in pair.run.parameters.items():
        torch.testing.assert_close(parameter.grad, pair.named[name].grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_five_steps(family: str, tmp_path: Path) -> None:
    pair = Pair(family, tmp_path / "job")
    trainer = Trainer(pair.passes)
    trainer.add(pair.run)
    optimizer = torch.optim.AdamW(list(pair.named.values()), weight_decay=0.0)
    for step in range(5):
        (batch,) = pair.run._order.step(step)
        for group in optimizer.param_groups:
            group["lr"] = RATE * factor(pair.spec, step, 5)
        loss = pair.theirs.loss([pair.rows[n] for n in batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        stepped = trainer.step()[0]
        assert isinstance(stepped, Stepped)
        assert stepped.loss == pytest.approx(float(loss.detach()), rel=1e-4)
    for name, parameter in pair.run.parameters.items():
        torch.testing.assert_close(parameter, pair.named[name], rtol=1e-3, atol=1e-5)
