"""What was trained is what is served: the engine's own runners give the training's logits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from deltas import heads, methods
from deltas.bank import PackedDelta
from deltas.errors import UnsupportedDelta
from deltas.formats import native
from deltas.pack import pack
from server.engine.backbone import Backbone
from server.engine.encoder import EncoderRow, EncoderRunner
from server.tuning.forward import Part, Passes, Scored
from server.tuning.messages import Finished, FromTuner, Stepped
from server.tuning.run import Run
from server.tuning.spec import Example, InitFrom, MethodSpec, Task
from tests import tuning

ALL = (
    "lora",
    "bottleneck",
    "compacter",
    "bitfit",
    "prompt",
    "prefix",
    "ia3",
    "ln",
    "diff_pruning",
    "masking",
    "intrinsic",
    "last_layer",
    "selective_module",
)


def served(backbone: Backbone, file: str) -> PackedDelta:
    """As residency makes it of a stored file."""
    state = backbone.model.state_dict()
    patches = methods.lower(native.load(Path(file)), backbone.spec, state.get)
    return pack(patches, backbone.spec, backbone.dtype)


def trained(
    passes: Passes, folder: Path, parts: list[MethodSpec], task: Task, **more: object
) -> tuple[Run, list[FromTuner]]:
    rows = tuning.examples(task, 24, kind=passes.backbone.spec.kind)
    spec = tuning.job(folder, parts, task, rows, **{"epochs": 4, "learning_rate": 1e-2, **more})
    run = Run.open(spec, folder, passes)
    return run, tuning.train(passes, run)


def fell(said: list[FromTuner]) -> bool:
    losses = [message.loss for message in said if isinstance(message, Stepped)]
    return sum(losses[-6:]) < sum(losses[:6])


@torch.no_grad()
def loss_of(passes: Passes, run: Run, rows: list[Example], delta: PackedDelta) -> Tensor:
    """Of every token to be predicted, by training's own pass with other patches."""
    (output,) = passes([Part(run.spec.task, rows, delta)])
    return output.outputs if isinstance(output, Scored) else output.losses


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("family", ["llama", "bert", "t5"])
def test_every_method_learns_and_is_stored_as_it_was(family: str, name: str, tmp_path: Path) -> None:
    passes = tuning.passes_of(family)
    task: Task = "classify" if family == "bert" else "generate"
    parts = [tuning.method(passes, name)] + ([tuning.head(passes, task)] if task == "classify" else [])
    run, said = trained(passes, tmp_path / "job", parts, task)
    assert fell(said)
    finished = said[-1]
    assert isinstance(finished, Finished)
    rows = tuning.examples(task, 5, seed=9, kind=passes.backbone.spec.kind)
    with torch.no_grad():
        own = passes.bind(run._components.patches(None))
    stored = methods.lower(native.load(Path(finished.file)), passes.backbone.spec, passes.weights._source)
    torch.testing.assert_close(
        loss_of(passes, run, rows, passes.bind(stored)), loss_of(passes, run, rows, own), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("name", ["lora", "bottleneck", "prompt", "prefix", "bitfit"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_encoders_row(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    passes = tuning.passes_of("bert", dtype)
    parts = [tuning.method(passes, name), tuning.head(passes, "classify")]
    run, said = trained(passes, tmp_path / "job", parts, "classify", epochs=1)
    finished = said[-1]
    assert isinstance(finished, Finished)
    rows = tuning.examples("classify", 6, seed=9)
    backbone = tuning.load("bert", dtype)
    delta = served(backbone, finished.file)
    assert delta.head is not None
    hidden = EncoderRunner(backbone).run([EncoderRow(row.tokens, delta) for row in rows])
    logits = torch.stack([heads.apply(delta.head, states) for states in hidden]).float()
    with torch.no_grad():
        own = loss_of(passes, run, rows, passes.bind(run._components.patches(None)))
    near = 1e-4 if dtype == torch.float32 else 5e-2
    torch.testing.assert_close(logits, own, rtol=near, atol=near)


def test_components_together_and_on_top_of_an_earlier_delta(tmp_path: Path) -> None:
    passes = tuning.passes_of("llama")
    both = [tuning.method(passes, "lora"), tuning.method(passes, "bottleneck")]
    _, said = trained(passes, tmp_path / "first", both, "generate")
    first = said[-1]
    assert isinstance(first, Finished)
    earlier = native.load(Path(first.file))
    assert earlier.methods == ["lora", "bottleneck"]
    init = InitFrom(name="first", digest=earlier.digest, file=first.file, frozen=True)
    run, said = trained(
        passes, tmp_path / "second", [tuning.method(passes, "bitfit")], "generate", init_from=init
    )
    second = said[-1]
    assert isinstance(second, Finished)
    delta = native.load(Path(second.file))
    assert delta.methods == ["lora", "bottleneck", "bitfit"]
    for component, kept in zip(delta.components, earlier.components, strict=False):
        for name, tensor in component.tensors.items():
            assert torch.equal(tensor, kept.tensors[name])
    assert next(message.loss for message in said if isinstance(message, Stepped)) < 4.5
    assert {name.partition("/")[0] for name in run.parameters} == {"0"}


@pytest.mark.parametrize(("kind", "task"), [("llama", "generate"), ("bert", "classify")])
def test_training_on_from_an_earlier_delta(kind: str, task: Task, tmp_path: Path) -> None:
    """At the job's end it is where it began, if it does not move; so is its head."""
    passes = tuning.passes_of(kind)
    parts = [tuning.method(passes, "lora")]
    if task == "classify":
        parts.append(tuning.head(passes, task))
    _, said = trained(passes, tmp_path / "first", parts, task)
    first = said[-1]
    assert isinstance(first, Finished)
    init = InitFrom(name="first", digest=native.load(Path(first.file)).digest, file=first.file, frozen=False)
    _, said = trained(passes, tmp_path / "second", parts, task, init_from=init, learning_rate=1e-30, epochs=1)
    second = said[-1]
    assert isinstance(second, Finished)
    assert native.load(Path(second.file)).digest == init.digest


@pytest.mark.parametrize("name", ["diff_pruning", "masking"])
def test_what_keeps_places_only_is_not_trained_on(name: str, tmp_path: Path) -> None:
    passes = tuning.passes_of("llama")
    parts = [tuning.method(passes, name)]
    _, said = trained(passes, tmp_path / "first", parts, "generate", epochs=1)
    first = said[-1]
    assert isinstance(first, Finished)
    init = InitFrom(name="first", digest=native.load(Path(first.file)).digest, file=first.file, frozen=False)
    with pytest.raises(UnsupportedDelta, match="Freeze it") as refused:
        trained(passes, tmp_path / "second", parts, "generate", init_from=init)
    assert refused.value.field == "init_from"
