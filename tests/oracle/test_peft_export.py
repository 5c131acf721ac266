"""What we write for PEFT, loaded by PEFT: the same logits as before, or as ours where the delta never was PEFT's."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedModel,
)

from deltas.backbones import describe
from deltas.delta import Component, Delta
from deltas.formats import DeltaFiles, peft_writer, read
from deltas.sites import BackboneSpec
from deltas.weights import FrozenTensors
from tests.oracle import test_peft_decoders
from tests.oracle.padded import BACKBONES, PaddedRow, PaddedRunner
from tests.oracle.peft_reference import PROMPT_SIZES, quiet, randomise
from tests.oracle.peft_table import (
    CASES,
    FAMILIES,
    ROWS,
    Case,
    Family,
    cells,
    fresh_backbone,
    load_delta,
    logits,
    save_delta,
)
from tests.oracle.table import PEFT_HEADED, PEFT_HEADS, peft_methods
from tests.unit.backbones import tiny

TOLERANCE = 1e-5
# What differs by family is how modules are called and stored: beside a case of each type, these.
EVERYWHERE = {
    *("lora", "lora_patterns", "lora_dora", "lora_bias_all", "lora_embedding", "lora_head", "lora_tokens"),
    *("lora_save_embedding_and_head", "lora_save_norms", "lora_save_linear"),
}
FIRST = {case.kind: case.name for case in reversed(CASES)}


def _chosen(case: Case, family: str) -> bool:
    if case.pickled:  # a ``.bin`` is the same delta; conversions are tested elsewhere
        return False
    if family == "llama" or case.name in EVERYWHERE:
        return True
    return family != "roberta" and FIRST[case.kind] == case.name


CELLS = [(case, family) for case, family in cells(CASES) if _chosen(case, family.name)]
# AdaLoRA without alpha scales every module by its own rank; we put that into E.
REWRITTEN = ("adalora_no_alpha",)


@cache
def runner(family: str) -> PaddedRunner:
    return PaddedRunner(family)


def upload(folder: Path) -> DeltaFiles:
    return DeltaFiles({path.name: path for path in folder.iterdir()})


def load(backbone: PreTrainedModel, folder: Path) -> PeftModel:
    """PEFT's own loading, which must miss no tensor."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = PeftModel.from_pretrained(backbone, folder)
    assert not [w for w in caught if "missing adapter keys" in str(w.message)]
    return model.eval()


def assert_same(got: Tensor, wanted: Tensor) -> None:
    assert float((got - wanted).abs().max()) <= TOLERANCE * float(wanted.abs().max())


@pytest.mark.parametrize(
    ("case", "family"), CELLS, ids=[f"{case.name}-{family.name}" for case, family in CELLS]
)
def test_what_peft_wrote_gives_the_same_once_written_by_us(
    case: Case, family: Family, tmp_path: Path
) -> None:
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    theirs.mkdir()
    ours.mkdir()
    save_delta(case, family, theirs, seed=3)
    backbone = runner(family.name)
    delta = read(upload(theirs), backbone.spec, backbone.weights)
    assert set(delta.methods) <= {*peft_methods(case), "override"}
    paths = peft_writer.save(delta, backbone.spec, ours, source=backbone.weights)
    assert [path.name for path in paths] == ["adapter_config.json", "adapter_model.safetensors"]
    before, after = load_delta(family, theirs), load(fresh_backbone(family), ours)
    for row in ROWS:
        assert_same(logits(after, row), logits(before, row))
    again = read(upload(ours), backbone.spec, backbone.weights)
    assert (again.digest == delta.digest) is (case.name not in REWRITTEN)


def normal(*shape: int, std: float = 0.3, mean: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape) * 31 + len(shape))
    return torch.randn(shape, generator=generator) * std + mean


def lora(spec: BackboneSpec, *names: str, rank: int = 3, **config: Any) -> Component:
    tensors = {}
    for index, name in enumerate(names):
        site = spec.sites[name]
        tensors[f"{name}/A"] = normal(rank + index, site.in_features)
        tensors[f"{name}/B"] = normal(site.out_features, rank + index)
    return Component("lora", {"scale": 0.7} | config, tensors)


def parts_of_a_fused_linear(spec: BackboneSpec) -> Delta:
    names = ("layers.0.attn.q", "layers.0.attn.v", "layers.1.attn.k", "layers.1.mlp.up")
    return Delta((lora(spec, *names, scales={"layers.0.attn.v": 1.3}),))


def gains_of_parts(spec: BackboneSpec) -> Delta:
    tensors = {f"layers.{i}.attn.{part}/gain": normal(32 + i, mean=1)[:32] for i in (0, 1) for part in "kv"}
    return Delta((Component("ia3", {"scale": 0.8}, tensors),))


def shifts(spec: BackboneSpec) -> Delta:
    sites = ("layers.0.attn.q", "layers.1.mlp.down")
    return Delta((Component("bitfit", {}, {f"{s}/beta": normal(spec.sites[s].out_features) for s in sites}),))


def lora_and_shifts(spec: BackboneSpec) -> Delta:
    """The simultaneous combination that PEFT has: biases trained beside LoRA."""
    sites = ("layers.0.mlp.up", "layers.1.attn.o", "layers.1.mlp.norm")
    beta = {f"{site}/beta": normal(spec.sites[site].out_features) for site in sites}
    names = ("layers.0.mlp.up", "layers.0.mlp.down")
    return Delta((lora(spec, *names), Component("bitfit", {}, beta)))


def halves_of_modules(spec: BackboneSpec) -> Delta:
    """Some weights, some biases: what is missing is the backbone's own."""
    tensors = {
        "layers.0.attn.norm/weight": normal(32, mean=1),
        "layers.1.mlp.norm/bias": normal(32),
        "layers.1.mlp.up/bias": normal(48),
        "layers.0.mlp.down/weight": normal(32, 48),
    }
    return Delta((Component("override", {}, tensors),))


def lora_and_halves_of_modules(spec: BackboneSpec) -> Delta:
    return Delta((lora(spec, "layers.0.mlp.up"), *halves_of_modules(spec).components))


def dora_where_there_is_no_bias(spec: BackboneSpec) -> Delta:
    """Without a bias, and with a scale of one, AdapterHub's DoRA is PEFT's."""
    made = lora(spec, "layers.0.attn.q", "layers.1.mlp.down", scale=1.0, dora="adapterhub")
    magnitudes = {f"{name}/magnitude": normal(32, mean=3) for name in made.sites()}
    return Delta((Component("lora", made.config, {**made.tensors, **magnitudes}),))


def scales_of_no_alpha(spec: BackboneSpec) -> Delta:
    names = [f"layers.{i}.attn.{x}" for i in (0, 1) for x in "qkv"]
    scales = {name: 0.1 + 0.37 * index for index, name in enumerate(names)}
    return Delta((lora(spec, *names, scales=scales),))


Make = Callable[[BackboneSpec], Delta]

NATIVE: list[tuple[Make, str]] = [
    (parts_of_a_fused_linear, "gpt2"),
    (gains_of_parts, "gpt2"),
    (shifts, "llama"),
    (shifts, "bert"),
    (lora_and_shifts, "gpt2"),
    (lora_and_shifts, "bert"),
    (halves_of_modules, "gpt2"),
    (halves_of_modules, "bert"),
    (lora_and_halves_of_modules, "gpt2"),
    (dora_where_there_is_no_bias, "llama"),
    (scales_of_no_alpha, "llama"),
    (scales_of_no_alpha, "roberta"),
]


@pytest.mark.parametrize(("make", "family"), NATIVE, ids=[f"{make.__name__}-{f}" for make, f in NATIVE])
def test_what_was_never_pefts_gives_our_logits_there(make: Make, family: str, tmp_path: Path) -> None:
    backbone = runner(family)
    delta = make(backbone.spec)
    peft_writer.save(delta, backbone.spec, tmp_path, source=backbone.weights)
    model = load(fresh_backbone(FAMILIES[family]), tmp_path)
    placed = backbone.place(delta)
    rows = [PaddedRow(row.ids, placed, row.decoder_ids or None) for row in ROWS]
    for row, ours in zip(ROWS, backbone.logits(rows), strict=True):
        assert_same(logits(model, row), ours)


CLASSES: Mapping[str, Any] = {
    "SEQ_CLS": AutoModelForSequenceClassification,
    "TOKEN_CLS": AutoModelForTokenClassification,
}


def tuned(kind: str, family: str, task: str) -> peft.PeftConfig:
    if kind == "prompt":
        sizes = PROMPT_SIZES.get(family, {})
        return peft.PromptTuningConfig(task_type=task, num_virtual_tokens=3, **sizes)
    return peft.LoraConfig(
        task_type=task,
        target_modules=list(FAMILIES[family].query_value),
        modules_to_save=["bert.pooler.dense"] if (family, task) == ("bert", "SEQ_CLS") else None,
        fan_in_fan_out=family == "gpt2",
    )


WITH_HEADS = [
    (kind, family, task)
    for kind in ("lora", "prompt")
    for family in PEFT_HEADED
    for task in PEFT_HEADS.values()
    if (kind, family, task)
    not in (
        ("prompt", "bert", "SEQ_CLS"),  # PEFT does not save BERT's pooler beside a prompt
        ("prompt", "modernbert", "SEQ_CLS"),  # nor what ModernBERT has before its classifier
        ("prompt", "modernbert", "TOKEN_CLS"),
    )
]


@pytest.mark.parametrize(("kind", "family", "task"), WITH_HEADS)
def test_heads_come_along(kind: str, family: str, task: str, tmp_path: Path) -> None:
    """PEFT's answers are ours, and those of what we write."""
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    ours.mkdir()

    def classifier(seed: int) -> PreTrainedModel:
        """Its head is random, by the seed, until a delta brings another."""
        torch.manual_seed(seed)
        with quiet():
            model: PreTrainedModel = CLASSES[task].from_pretrained(BACKBONES / family, num_labels=3)
        model.config.pad_token_id = 1
        return model.eval()

    with quiet():
        before = peft.get_peft_model(classifier(0), tuned(kind, family, task))
        randomise(before, {})
        before.eval().save_pretrained(theirs)
    backbone = runner(family)
    delta = read(upload(theirs), backbone.spec, backbone.weights)
    assert delta.methods == [kind, "head"]
    peft_writer.save(delta, backbone.spec, ours, source=backbone.weights)
    after = load(classifier(1), ours)
    for ids in ([5, 9, 33, 2, 17], [44, 3]):
        with torch.no_grad():
            wanted = before(input_ids=torch.tensor([ids])).logits[0]
            assert_same(after(input_ids=torch.tensor([ids])).logits[0], wanted)
        (ours_too,) = backbone.classes([PaddedRow(ids, backbone.place(delta))])
        assert ours_too.shape == wanted.shape
        assert_same(ours_too, wanted)


@pytest.mark.parametrize("name", ["gemma2", "gpt_neox", "opt", "qwen3"])
def test_other_decoders(name: str, tmp_path: Path) -> None:
    """Names of modules, fused or not, and embeddings that multiply."""
    folder = tiny.save(name, tmp_path)
    frozen = FrozenTensors(folder)
    spec = describe(AutoConfig.from_pretrained(folder), "oracle")
    for index, (case, config) in enumerate(test_peft_decoders.configs(name).items()):
        theirs, ours = tmp_path / case, tmp_path / f"{case} again"
        ours.mkdir()
        before = test_peft_decoders.saved(theirs, config, folder, index)
        delta = read(upload(theirs), spec, frozen)
        peft_writer.save(delta, spec, ours, source=frozen)
        after = load(test_peft_decoders.stock(folder), ours)
        for row in ROWS:
            assert_same(logits(after, row), logits(before, row))
        assert read(upload(ours), spec, frozen).digest == delta.digest, case


def test_the_config_says_what_a_reader_wants_to_know(tmp_path: Path) -> None:
    spec = runner("llama").spec
    names = [f"layers.{i}.attn.{x}" for i in (0, 1) for x in "qv"]
    scales = {"layers.1.attn.q": 1.4, "layers.1.attn.v": 1.4}
    delta = Delta(
        (lora(spec, *names, rank=8, scales=scales),), metadata={"base_model_name_or_path": "org/model"}
    )
    peft_writer.save(delta, spec, tmp_path, base_model="another")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "org/model"
    assert (config["peft_type"], config["task_type"], config["bias"]) == ("LORA", "CAUSAL_LM", "none")
    assert config["target_modules"] == ["q_proj", "v_proj"]
    assert config["inference_mode"] is True
    nameless = Delta(delta.components)
    assert peft_writer.export(nameless, spec).config["base_model_name_or_path"] is None
    assert peft_writer.export(nameless, spec, base_model="ours").config["base_model_name_or_path"] == "ours"
