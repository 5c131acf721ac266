"""The encoder's runner: packed rows of any length and kind, as Hugging Face's own model gives for each row alone."""

from __future__ import annotations

import random
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForMaskedLM

from deltas import heads, methods
from deltas.bank import PackedDelta
from deltas.delta import Component, Delta
from deltas.errors import DeltaError
from deltas.ops import Mode
from deltas.pack import pack
from deltas.sites import SiteKind
from deltas.weights import FrozenTensors
from server.engine import backbone as backbones
from server.engine.encoder import EncoderRow, EncoderRunner
from server.engine.encoder_probe import EncoderProbe
from tests.deltas_of_every_kind import make, served
from tests.oracle.padded import BACKBONES, PaddedRow, PaddedRunner

FAMILIES = ("bert", "distilbert", "modernbert", "roberta")
CLOSE = 1e-5
CPU = torch.device("cpu")


@cache
def runner(family: str, mode: Mode = "native", dtype: torch.dtype = torch.float32) -> EncoderRunner:
    return EncoderRunner(backbones.load(family, BACKBONES / family, CPU, dtype), mode)


@cache
def padded(family: str) -> PaddedRunner:
    return PaddedRunner(family)


def place(run: EncoderRunner, *parts: Delta) -> PackedDelta:
    spec, weights = run.backbone.spec, FrozenTensors(run.backbone.folder)
    return pack(methods.lower_sum([(part, 1.0) for part in parts], spec, weights), spec, run.backbone.dtype)


def tokens(seed: int, count: int) -> list[int]:
    return torch.randint(3, 61, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def error(got: Tensor, wanted: Tensor) -> float:
    assert got.shape == wanted.shape
    return float((got.float() - wanted).abs().max() / wanted.abs().max())


def prompts_and_prefixes(family: str) -> dict[str, Delta]:
    """Virtual tokens of every sort that the family takes, of different lengths."""
    spec = runner(family).backbone.spec
    kinds = [kind for kind in ("prompt", "prefix") if kind in served(spec)]
    found = {f"{kind} {seed}": make(spec, kind, seed) for kind in kinds for seed in (1, 2, 3)}
    if "embed.positions" not in spec.sites:
        return found
    for seed, count in ((4, 2), (5, 7)):
        drawn = torch.randn(count, spec.hidden, generator=torch.Generator().manual_seed(seed))
        found[f"after the norm {seed}"] = Delta(
            (Component("prompt", {"after_norm": True}, {"embeddings": drawn}),)
        )
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_backbone(family: str) -> None:
    """No mask is built for packed rows; positions and token types are each row's own."""
    run = runner(family)
    own = AutoModelForMaskedLM.from_pretrained(BACKBONES / family).eval()
    kinds = getattr(own.config, "type_vocab_size", 0)
    masks: list[Any] = []
    layers = run.backbone.spec.of_kind(SiteKind.KV)
    seen = [
        run.backbone.model.get_submodule(site.path).register_forward_pre_hook(
            lambda _module, args, kwargs: masks.append(kwargs.get("attention_mask", args[1:2] or None)),
            with_kwargs=True,
        )
        for site in layers
    ]
    rows = [
        EncoderRow(tokens(n, n), types=[t % kinds for t in tokens(n + 90, n)] if kinds else None)
        for n in (3, 20, 7, 7, 40, 1)
    ]
    got = run.run(rows)
    for handle in seen:
        handle.remove()
    assert masks in ([None] * len(layers), [(None,)] * len(layers))
    for row, hidden in zip(rows, got, strict=True):
        with torch.no_grad():
            given = {"token_type_ids": torch.tensor([row.types])} if kinds else {}
            wanted = own(torch.tensor([row.ids]), **given)
            states = own.base_model(torch.tensor([row.ids]), **given).last_hidden_state
        assert error(hidden, states[0]) < CLOSE
        logits = run.logits(hidden, None)
        assert logits is not None
        assert error(logits, wanted.logits[0]) < CLOSE


@pytest.mark.parametrize("mode", ["native", "dense", "reference"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_kind_in_one_batch(family: str, mode: Mode) -> None:
    """Each row as alone and padded, which is as the delta's library gives (the oracle tables)."""
    run, alone = runner(family, mode), padded(family)
    deltas = {name: make(run.backbone.spec, name, 7) for name in served(run.backbone.spec)}
    deltas |= prompts_and_prefixes(family)
    cases: list[tuple[str, Delta | None, int]] = [("base", None, n) for n in (3, 11, 30)]
    cases += [(name, delta, 3 + (n * 7) % 29) for n, (name, delta) in enumerate(deltas.items())]
    cases += [(name, delta, 5 + (n * 5) % 23) for n, (name, delta) in enumerate(deltas.items())]
    random.Random(family).shuffle(cases)
    packed = {name: place(run, delta) for name, delta in deltas.items()}
    rows = [EncoderRow(tokens(i, n), packed.get(name)) for i, (name, _, n) in enumerate(cases)]
    wanted = [
        alone.logits([PaddedRow(row.ids, None if delta is None else alone.place(delta))])[0]
        for row, (_, delta, _) in zip(rows, cases, strict=True)
    ]
    for row, hidden, want, (name, _, _) in zip(rows, run.run(rows), wanted, cases, strict=True):
        before = 0 if row.prompt is None else len(row.prompt)
        assert len(hidden) == before + len(row.ids)
        logits = run.logits(hidden[before:], row.delta)
        assert logits is not None
        assert error(logits, want) < CLOSE, name


def test_rows_longer_than_windows() -> None:
    """ModernBERT's rows of 3 to 500 tokens, some of one length, with and without a prompt, as its own model gives."""
    run = runner("modernbert")
    own = AutoModelForMaskedLM.from_pretrained(BACKBONES / "modernbert", attn_implementation="eager").eval()
    prompt = make(run.backbone.spec, "prompt", 1)
    packed = place(run, prompt)
    embeddings = prompt.components[0].tensors["embeddings"]
    lengths = (3, 500, 9, 128, 257, 9, 130, 500, 64)
    rows = [EncoderRow(tokens(n, count), packed if n % 2 else None) for n, count in enumerate(lengths)]
    for row, hidden in zip(rows, run.run(rows), strict=True):
        with torch.no_grad():
            embedded = own.get_input_embeddings()(torch.tensor([row.ids]))
            if row.delta is not None:
                embedded = torch.cat([embeddings[None], embedded], dim=1)
            wanted = own.base_model(inputs_embeds=embedded).last_hidden_state[0]
        assert error(hidden, wanted) < CLOSE, len(row.ids)


def test_rows_of_one_delta_side_by_side_keep_apart() -> None:
    """Gates read one row's tokens: two rows of a gated delta are no segment together."""
    run = runner("bert")
    delta = place(run, make(run.backbone.spec, "gated_lora", 3))
    rows = [EncoderRow(tokens(n, n), delta) for n in (5, 5, 9)]
    together = run.run(rows)
    for row, hidden in zip(rows, together, strict=True):
        assert error(hidden, run.run([row])[0]) < CLOSE


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_is_near_float32(family: str) -> None:
    run, truth = runner(family, "native", torch.bfloat16), runner(family)
    names = [
        name
        for name in served(run.backbone.spec)
        if name in ("lora", "bottleneck", "bitfit", "prefix", "head")
    ]
    deltas = {name: make(run.backbone.spec, name, 2, std=0.1) for name in names}
    deltas |= {
        name: delta for name, delta in prompts_and_prefixes(family).items() if name.endswith(("1", "4"))
    }
    ids = {name: tokens(n, 4 + 5 * n) for n, name in enumerate(deltas)}
    low = run.run([EncoderRow(ids[name], place(run, delta)) for name, delta in deltas.items()])
    high = truth.run([EncoderRow(ids[name], place(truth, delta)) for name, delta in deltas.items()])
    for name, got, wanted in zip(deltas, low, high, strict=True):
        assert got.dtype == torch.bfloat16
        assert error(got, wanted) < 0.05, name


def test_a_poisoned_row_leaves_its_neighbours_bit_identical() -> None:
    run = runner("bert")
    spec = run.backbone.spec
    poison = Delta((Component("bitfit", {}, {"layers.0.mlp.down/beta": torch.full((spec.hidden,), 3e38)}),))
    other = place(run, make(spec, "lora", 1))
    rows = [
        EncoderRow(tokens(1, 9)),
        EncoderRow(tokens(2, 9), place(run, poison)),
        EncoderRow(tokens(3, 9), other),
    ]
    harmless = [rows[0], EncoderRow(rows[1].ids, place(run, make(spec, "bitfit", 1))), rows[2]]
    got, wanted = run.run(rows), run.run(harmless)
    assert not bool(torch.isfinite(got[1]).all())
    assert torch.equal(got[0], wanted[0])
    assert torch.equal(got[2], wanted[2])


def test_heads_of_different_sizes_in_one_batch() -> None:
    """The head reads prompt tokens too, as the libraries' do."""
    run, alone = runner("bert"), padded("bert")
    spec = run.backbone.spec
    deltas = []
    for seed, (outputs, pooling) in enumerate([(2, "first"), (5, "mean"), (151, "last"), (1, "first")]):
        drawn = torch.randn(outputs, spec.hidden, generator=torch.Generator().manual_seed(seed))
        config = {"kind": "classify", "pooling": pooling, "activations": ["identity"], "labels": None}
        body = make(spec, ["lora", "prompt", "bottleneck", "prefix"][seed], seed).components
        deltas.append(Delta((*body, Component("head", config, {"layers.0/weight": drawn}))))
    rows = [EncoderRow(tokens(n, 4 + 9 * n), place(run, delta)) for n, delta in enumerate(deltas)]
    for row, hidden, delta in zip(rows, run.run(rows), deltas, strict=True):
        assert row.delta is not None
        assert row.delta.head is not None
        wanted = alone.classes([PaddedRow(row.ids, alone.place(delta))])[0]
        assert error(heads.apply(row.delta.head, hidden), wanted) < CLOSE


# -- the probe -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_probe_of_every_kind(family: str) -> None:
    run = runner(family)
    probe = EncoderProbe(run)
    for name in served(run.backbone.spec):
        assert probe.run(place(run, make(run.backbone.spec, name, 5))).outcome == "changes", name
    for name, delta in prompts_and_prefixes(family).items():
        assert probe.run(place(run, delta)).outcome == "changes", name
    assert run.hooks.plan is None


def test_probe_finds_what_does_nothing_and_what_is_poison() -> None:
    run = runner("bert")
    probe, hidden = EncoderProbe(run), run.backbone.spec.hidden

    def judged(site: str, value: float, width: int = hidden) -> str:
        return probe.run(
            place(run, Delta((Component("bitfit", {}, {f"{site}/beta": torch.full((width,), value)}),)))
        ).outcome

    assert judged("layers.0.mlp.down", 0.0) == "nothing"
    assert judged("layers.0.mlp.down", 3e38) == "not_finite"
    assert judged("layers.1.mlp.down", 0.5) == "changes"


def test_probe_reaches_tables_of_positions_and_types() -> None:
    run = runner("roberta")
    spec, probe = run.backbone.spec, EncoderProbe(run)
    for site in ("embed", "embed.positions", "embed.types"):
        rows = spec.sites[site].in_features
        where = torch.tensor([rows - 1])
        tensors = {f"{site}/rows": torch.ones(1, spec.hidden), f"{site}/indices": where}
        assert probe.run(place(run, Delta((Component("tokens", {}, tensors),)))).outcome == "changes", site


# -- loading -------------------------------------------------------------------------------------------------------


def bare(folder: Path, family: str = "bert") -> Path:
    """The backbone as sentence encoders are published: without the language model's head."""
    AutoModelForMaskedLM.from_pretrained(BACKBONES / family).base_model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("family", FAMILIES)
def test_a_checkpoint_without_a_head_has_no_sites_there(family: str, tmp_path: Path) -> None:
    run = EncoderRunner(backbones.load("bare", bare(tmp_path, family), CPU, torch.float32))
    assert not [name for name in run.backbone.spec.sites if name.startswith("head")]
    own = AutoModelForMaskedLM.from_pretrained(BACKBONES / family).base_model.eval()
    assert run.backbone.parameters == sum(p.numel() for p in own.parameters())
    ids = tokens(1, 9)
    (hidden,) = run.run([EncoderRow(ids)])
    with torch.no_grad():
        assert error(hidden, own(torch.tensor([ids])).last_hidden_state[0]) < CLOSE
    assert run.logits(hidden, None) is None
    with pytest.raises(DeltaError, match=r"head\.dense"):
        place(run, Delta((Component("bitfit", {}, {"head.dense/beta": torch.ones(32)}),)))
    shift = Delta((Component("bitfit", {}, {"layers.1.mlp.down/beta": torch.ones(32)}),))
    assert EncoderProbe(run).run(place(run, shift)).outcome == "changes"


def test_a_checkpoint_with_the_old_names_of_norms(tmp_path: Path) -> None:
    """As bert-base-uncased has them: the head is there, and deltas find the norms' own values."""
    shutil.copytree(BACKBONES / "bert", tmp_path / "old")
    tensors = load_file(tmp_path / "old" / "model.safetensors")
    old = {
        key.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
        for key, tensor in tensors.items()
    }
    assert old.keys() != tensors.keys()
    save_file(old, tmp_path / "old" / "model.safetensors", {"format": "pt"})
    loaded = backbones.load("old", tmp_path / "old", CPU, torch.float32)
    assert loaded.spec.sites.keys() == runner("bert").backbone.spec.sites.keys()
    found, wanted = FrozenTensors(tmp_path / "old"), FrozenTensors(BACKBONES / "bert")
    for site in loaded.spec.of_kind(SiteKind.NORM):
        for key in (f"{site.path}.weight", f"{site.path}.bias"):
            own = wanted(key)
            again = found(key)
            assert own is not None
            assert again is not None
            assert torch.equal(own, again)


def test_a_checkpoint_that_lacks_weights_is_refused(tmp_path: Path) -> None:
    bare(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["encoder.layer.1.output.dense.bias"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        backbones.BackboneError, match=r"lacks 1 weights .* bert\.encoder\.layer\.1\.output\.dense\.bias"
    ):
        backbones.load("bare", tmp_path, CPU, torch.float32)
