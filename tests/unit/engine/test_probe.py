"""The probe: what a delta's first forward pass finds, on the real runner over tiny backbones."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from deltas import methods
from deltas.bank import PackedDelta
from deltas.delta import Component, Delta
from deltas.hooks import weight_of
from deltas.ops import Mode, placed
from deltas.pack import pack
from deltas.patches import DenseDiff
from deltas.sites import SiteKind
from deltas.weights import FrozenTensors
from server.engine.messages import Load
from server.engine.probe import SEED, TOKENS, Probe
from server.engine.runner import Runner
from server.types import ProbeResult
from tests.oracle.rows import make_runner
from tests.tiny import KINDS, random_delta, write_backbone
from tests.unit.engine.running import Harness, harnesses

GPT2 = Path(__file__).parents[2] / "oracle" / "fixtures" / "backbones" / "gpt2"
CAPACITY = 64

MakeRunner = Callable[..., Runner]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_backbone(tmp_path_factory.mktemp("probe") / "tiny")


@pytest.fixture
def runner(tiny: Path) -> Runner:
    return make_runner(tiny, torch.float32, capacity=CAPACITY)


def place(runner: Runner, delta: Delta) -> PackedDelta:
    """As the residency does, with the backbone's own weights at hand."""
    spec = runner.backbone.spec
    patches = methods.lower(delta, spec, FrozenTensors(runner.backbone.folder))
    return runner.finish(pack(patches, spec, runner.backbone.dtype))


def probed(runner: Runner, delta: Delta) -> ProbeResult:
    return Probe(runner).run(place(runner, delta))


def one(method: str, tensors: Mapping[str, Tensor], **config: object) -> Delta:
    return Delta((Component(method, config, dict(tensors)),))


def own(runner: Runner, site: str) -> Tensor:
    """A copy of the backbone's own weight, as an upload would repeat it."""
    module = runner.backbone.model.get_submodule(runner.backbone.spec.sites[site].path)
    return weight_of(module).float().clone()


def lora(runner: Runner, *, a: float = 0.3, b: float = 0.3, scale: float = 1.0, only: str = "") -> Delta:
    make, tensors = torch.Generator().manual_seed(7), {}
    for site in runner.backbone.spec.of_kind(SiteKind.LINEAR):
        if site.name != "head" and only in site.name:
            tensors[f"{site.name}/A"] = torch.randn(3, site.in_features, generator=make) * a
            tensors[f"{site.name}/B"] = torch.randn(site.out_features, 3, generator=make) * b
    return one("lora", tensors, scale=scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", ["native", "dense", "reference"])
def test_deltas_that_act(tiny: Path, mode: Mode, dtype: torch.dtype) -> None:
    runner = make_runner(tiny, dtype, mode, capacity=CAPACITY)
    for kind in KINDS:
        for size in (0.3, 0.01):
            delta = random_delta(runner.backbone.spec, kind, 3, size=size)
            assert probed(runner, delta) == ProbeResult("changes"), (kind, size)


def fresh(runner: Runner) -> Iterator[tuple[str, Delta]]:
    """Deltas as their libraries initialise them, and others that come to nothing."""
    spec = runner.backbone.spec
    ones = {f"layers.{i}.attn.k/gain": torch.ones(32) for i in range(2)}
    yield "B is zero", lora(runner, b=0.0)
    yield "A is zero", lora(runner, a=0.0)
    yield "alpha is zero", lora(runner, scale=0.0)
    adapter = random_delta(spec, "bottleneck", 2).components[0]
    silent = {n: t * 0 if "/up" in n else t for n, t in adapter.tensors.items()}
    yield "up is zero", one("bottleneck", silent, **adapter.config)
    yield "gains of one", one("ia3", ones)
    yield "input gains of one", one("ia3", {"layers.0.mlp.down/input_gain": torch.ones(96)})
    yield (
        "the norms' own values",
        one("override", {f"{s}/weight": own(runner, s) for s in ("norm", "layers.1.mlp.norm")}),
    )
    yield "a linear's own values", one("override", {"layers.0.attn.q/weight": own(runner, "layers.0.attn.q")})
    rows = own(runner, "embed")[[5, 9]]
    yield "tokens' own rows", one("tokens", {"embed/indices": torch.tensor([5, 9]), "embed/rows": rows})
    zeros = torch.zeros(2, 64)
    yield "all zero", one("lora", {"layers.0.attn.q/A": zeros, "layers.0.attn.q/B": zeros.T}, scale=1.0)
    yield "hundreds of zeros", one("bitfit", {"norm/beta": torch.zeros(64)})
    weight = own(runner, "layers.0.attn.q")
    dora = {"A": torch.randn(2, 64), "B": torch.zeros(64, 2), "magnitude": weight.norm(dim=1)}
    yield (
        "DoRA before its first step",
        one("lora", {f"layers.0.attn.q/{n}": t for n, t in dora.items()}, scale=1.0, dora="peft"),
    )


def test_deltas_that_come_to_nothing(tiny: Path) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        runner = make_runner(tiny, dtype, capacity=CAPACITY)
        for name, delta in fresh(runner):
            found = probed(runner, delta)
            assert found.outcome == "nothing", (name, dtype, found)
            assert any(site in found.message for site in ("layers.", "norm", "embed")), (name, found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_small_change_is_told_from_none(tiny: Path, dtype: torch.dtype) -> None:
    """As it shrinks, a delta changes logits, then only what lies before them, then not one bit."""
    runner = make_runner(tiny, dtype, capacity=CAPACITY)
    outcomes = [
        probed(runner, lora(runner, scale=10.0**-n, only="layers.0.attn.q")).outcome for n in range(14)
    ]
    order = {"changes": 0, "rounding": 1, "nothing": 2}
    assert [order[o] for o in outcomes] == sorted(order[o] for o in outcomes)
    assert set(outcomes) == set(order)
    assert outcomes[3] == "changes"  # a thousandth of an ordinary delta


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("site", ["layers.0.attn.k", "layers.1.mlp.down"])
def test_numbers_that_overflow_are_found_at_their_site(tiny: Path, dtype: torch.dtype, site: str) -> None:
    runner = make_runner(tiny, dtype, capacity=CAPACITY)
    found = probed(runner, lora(runner, a=1e25, b=1e25, only=site))
    assert found.outcome == "not_finite"
    assert f"first at {site}" in found.message
    assert str(dtype)[6:] in found.message
    assert probed(runner, lora(runner)) == ProbeResult("changes"), "the scratch slot remembers"


def unusual_token(vocab: int) -> int:
    usual = torch.randint(vocab, (TOKENS,), generator=torch.Generator().manual_seed(SEED))
    return next(token for token in range(vocab) if token not in usual)


def test_deltas_of_single_tokens_are_tried_with_those(runner: Runner) -> None:
    spec = runner.backbone.spec
    token = unusual_token(spec.vocab)
    row = torch.randn(1, spec.hidden, generator=torch.Generator().manual_seed(1))
    assert (
        probed(runner, one("tokens", {"embed/indices": torch.tensor([token]), "embed/rows": row})).outcome
        == "changes"
    )
    table = torch.zeros(2, spec.vocab)
    table[:, token] = 1.0
    up = torch.randn(spec.hidden, 2, generator=torch.Generator().manual_seed(2))
    assert probed(runner, one("lora", {"embed/A": table, "embed/B": up}, scale=1.0)).outcome == "changes"
    whole = own(runner, "embed")
    whole[token] += 0.5
    assert probed(runner, one("override", {"embed/weight": whole})).outcome == "changes"


def test_deltas_of_single_positions_are_tried_there() -> None:
    runner = make_runner(GPT2, torch.float32, capacity=48)
    table = own(runner, "embed.positions")
    assert probed(runner, one("override", {"embed.positions/weight": table})).outcome == "nothing"
    table[40] += 0.5
    assert probed(runner, one("override", {"embed.positions/weight": table})).outcome == "changes"


def test_prompts_and_prefixes_act_by_attention(runner: Runner) -> None:
    spec = runner.backbone.spec
    probe = Probe(runner)
    draw = torch.Generator().manual_seed(4)
    kv = {
        f"layers.{i}.attn.kv/{part}": torch.randn(5, spec.kv_heads, spec.head_dim, generator=draw) * 0.3
        for i in range(spec.layers)
        for part in ("keys", "values")
    }
    for shifts in (True, False):
        delta = place(runner, one("prefix", kv, shifts_positions=shifts))
        assert delta.prefix_length == 5
        assert probe.run(delta) == ProbeResult("changes")
    long = place(runner, one("prompt", {"embeddings": torch.randn(CAPACITY - 1, spec.hidden)}))
    assert probe.run(long).outcome == "changes"  # with the one token that there is room for
    too_long = {name: t.repeat(13, 1, 1)[:CAPACITY] for name, t in kv.items()}
    found = probe.run(place(runner, one("prefix", too_long, shifts_positions=False)))
    assert found == ProbeResult("failed", f"{CAPACITY} virtual tokens leave no room in rows of {CAPACITY}")


def test_a_head_is_an_output(runner: Runner) -> None:
    config = {"kind": "classify", "pooling": "last", "activations": ["identity"], "labels": None}
    for value, outcome in ((0.5, "changes"), (0.0, "nothing"), (1e38, "not_finite")):
        tensors = {"layers.0/weight": torch.full((2, 64), value)}
        assert probed(runner, one("head", tensors, **config)).outcome == outcome, value


def test_a_site_that_is_never_reached_is_a_refusal(runner: Runner) -> None:
    """What the probe is for: were a hook lost, the delta would be served without a part of it."""
    delta = place(runner, lora(runner))
    module = runner.backbone.model.get_submodule("model.layers.1.mlp.down_proj")
    hooked = type(module)
    module.__class__ = nn.Linear
    try:
        found = Probe(runner).run(delta)
    finally:
        module.__class__ = hooked
    assert found.outcome == "failed"
    assert "layers.1.mlp.down" in found.message


def test_a_step_that_cannot_be_computed_is_a_refusal(runner: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    delta = place(runner, one("dense", {"norm/matrix": torch.ones(64)}))
    apply = placed.apply

    def broken(step: placed.Placed, *given: object) -> None:
        if isinstance(step.patch, DenseDiff):
            raise RuntimeError("no such kernel")
        apply(step, *given)  # type: ignore[arg-type]

    monkeypatch.setattr(placed, "apply", broken)
    assert Probe(runner).run(delta) == ProbeResult(
        "failed", "the forward pass fails with it: RuntimeError: no such kernel"
    )
    assert runner.hooks.plan is None
    assert probed(runner, lora(runner)) == ProbeResult("changes")


def test_a_probe_is_one_pass_of_sixteen_tokens_in_the_scratch_slot(
    runner: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    probe, forward, passes = Probe(runner), runner.forward, []

    def counted(attention: object, positions: Tensor, **inputs: Tensor) -> Tensor:
        passes.append(positions.shape[1])
        return forward(attention, positions, **inputs)  # type: ignore[arg-type]

    monkeypatch.setattr(runner, "forward", counted)
    runner.kv.data[: runner.scratch_slot] = 0.25
    deltas = [place(runner, random_delta(runner.backbone.spec, kind, 1)) for kind in KINDS]
    passes.clear()
    for delta in deltas:
        assert probe.run(delta).outcome == "changes"
    assert passes == [TOKENS] * (1 + len(deltas))  # the backbone alone once
    assert bool((runner.kv.data[: runner.scratch_slot] == 0.25).all())


def test_running_rows_do_not_see_probes(tmp_path: Path) -> None:
    """Their log-probabilities are the same to the bit, with a probe before nearly every step or none."""
    with harnesses(tmp_path / "tiny") as start:
        told = []
        for noisy in (False, True):
            engine: Harness = start()
            spec = engine.engine.runner.backbone.spec
            rows = [None, *(engine.save(random_delta(spec, kind, 9)) for kind in KINDS)]
            others = [engine.save(random_delta(spec, kind, seed)) for kind in KINDS for seed in (1, 2, 3)]
            others.append(engine.save(lora(engine.engine.runner, a=1e25, b=1e25)))
            for row, ref in enumerate(rows):
                engine.submit(row, [5, 6, 7, 8 + row], ref, max_tokens=24, logprobs=5)
            for load, ref in enumerate(others if noisy else []):
                engine.engine.receive(Load(100 + load, ref))
            engine.wait(*range(len(rows)), *(100 + n for n in range(len(others) if noisy else 0)))
            told.append([engine.events[row] for row in range(len(rows))])
            if noisy:
                outcomes = [engine.probes[100 + n].outcome for n in range(len(others))]
                assert outcomes == ["changes"] * (len(others) - 1) + ["not_finite"]
        assert told[0] == told[1]
