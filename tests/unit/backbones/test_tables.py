"""Every family's table against a real model of it: paths and widths, the order of a pass, blocks, keys and values."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    AttentionInterface,
    AutoConfig,
    AutoModelForCausalLM,
    BartForConditionalGeneration,
    BertForMaskedLM,
    DistilBertForMaskedLM,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    ModernBertForMaskedLM,
    RobertaForMaskedLM,
    T5ForConditionalGeneration,
)
from transformers.pytorch_utils import Conv1D

from deltas.backbones import describe, families
from deltas.sites import BackboneSpec, Site, SiteKind
from tests.unit.backbones import tiny

BACKBONES = Path(__file__).parents[2] / "oracle" / "fixtures" / "backbones"
MODELS: dict[str, Any] = {
    "bart": BartForConditionalGeneration,
    "bert": BertForMaskedLM,
    "distilbert": DistilBertForMaskedLM,
    "gpt2": GPT2LMHeadModel,
    "llama": LlamaForCausalLM,
    "modernbert": ModernBertForMaskedLM,
    "roberta": RobertaForMaskedLM,
    "t5": T5ForConditionalGeneration,
    "t5_gated": T5ForConditionalGeneration,
}
TOKENS, ENCODED = 7, 5
OUTER_NORMS = {"gemma2", "gemma3_text"}
ROTARY = {"gemma", "gemma2", "gemma3_text", "gpt_neox", "llama", "mistral", "modernbert", "qwen2", "qwen3"}
NEVER_CALLED = {
    "shared",
    "model.shared",
}  # T5's and BART's stacks have token embeddings of their own, which share its weight
ONLY_A_TIED_BIAS = {"bert": {"cls.predictions"}, "roberta": {"lm_head"}}


class Backbone(NamedTuple):
    model: Any
    spec: BackboneSpec


class Calls(NamedTuple):
    """What a pass did: the modules in order of their calls, and what went into and came out of each."""

    order: list[str]
    given: dict[str, Tensor]
    gave: dict[str, Tensor]
    attended: dict[str, tuple[Tensor, Tensor]]  # by attention module: keys and values, [tokens, width]


@pytest.fixture(scope="module", params=sorted([*MODELS, *tiny.CONFIGS]))
def backbone(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    if request.param in MODELS:
        folder, kind = BACKBONES / request.param, MODELS[request.param]
    else:
        folder = tiny.save(request.param, tmp_path_factory.mktemp("backbone"))
        kind = AutoModelForCausalLM
    model = kind.from_pretrained(folder, attn_implementation="eager").eval()
    return Backbone(model, describe(AutoConfig.from_pretrained(folder), "r1"))


def leaves(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that have weights of their own."""
    return {path: m for path, m in model.named_modules() if list(m.parameters(recurse=False))}


@contextmanager
def recorded(model: Any) -> Iterator[Calls]:
    calls = Calls([], {}, {}, {})
    paths = {module: path for path, module in model.named_modules()}

    def note(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        calls.order.append(paths[module])
        calls.given[paths[module]], calls.gave[paths[module]] = args[0], output

    def attend(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any
    ) -> tuple[Tensor, None]:
        flat = tuple(t[0].transpose(0, 1).flatten(1) for t in (key, value))
        calls.attended[paths[module]] = (flat[0], flat[1])
        out = functional.scaled_dot_product_attention(query, key, value, enable_gqa=True)
        return out.transpose(1, 2), None

    AttentionInterface.register("recorded", attend)
    model.set_attn_implementation("recorded")
    handles = [module.register_forward_hook(note) for module in leaves(model).values()]
    yield calls
    for handle in handles:
        handle.remove()


@pytest.fixture(scope="module")
def calls(backbone: Backbone) -> Calls:
    ids = torch.arange(3, 3 + TOKENS)[None]
    inputs = {"input_ids": ids}
    if backbone.spec.kind == "encoder-decoder":
        inputs = {"input_ids": ids[:, :ENCODED], "decoder_input_ids": ids}
    with recorded(backbone.model) as found, torch.no_grad():
        backbone.model(**inputs)
    return found


def test_paths_widths_and_biases(backbone: Backbone) -> None:
    model, spec = backbone
    for name, site in spec.sites.items():
        assert site.name == name
        module = model.get_submodule(site.path)
        if site.kind is SiteKind.LINEAR:
            weight = module.weight.T if spec.conv1d and isinstance(module, Conv1D) else module.weight
            rows, width = weight.shape
            assert width == site.in_features
            assert site.offset + site.out_features <= rows if site.part else site.out_features == rows
            assert (module.bias is not None) == site.bias
        elif site.kind is SiteKind.NORM:
            assert tuple(module.weight.shape) == (site.in_features,) == (site.out_features,)
            assert (getattr(module, "bias", None) is not None) == site.bias
        elif site.kind is SiteKind.EMBEDDING:
            assert tuple(module.weight.shape) == (site.in_features, site.out_features)
        elif site.kind is SiteKind.BLOCK:
            assert site.in_features == site.out_features == spec.hidden
            model.get_submodule(site.residual)
            model.get_submodule(site.inner)
            assert bool(site.norm) != spec.pre_norm


def test_nothing_that_has_weights_is_without_a_site(backbone: Backbone) -> None:
    without = set(leaves(backbone.model)) - set(backbone.spec.by_path)
    assert without == ONLY_A_TIED_BIAS.get(backbone.spec.family, set())
    assert set(backbone.spec.by_path) <= set(leaves(backbone.model))


def test_the_head_is_the_models_own(backbone: Backbone) -> None:
    model, spec = backbone
    assert model.get_submodule(spec.sites["head"].path) is model.get_output_embeddings()
    assert model.get_submodule(spec.sites["embed"].path) is model.get_input_embeddings()
    assert (spec.vocab, spec.hidden) == tuple(model.get_input_embeddings().weight.shape)


def test_sites_are_in_the_order_of_a_pass(backbone: Backbone, calls: Calls) -> None:
    spec = backbone.spec
    called = [path for path in calls.order if path not in ONLY_A_TIED_BIAS.get(spec.family, set())]
    assert [path for path in spec.by_path if path not in NEVER_CALLED] == called


def test_blocks(backbone: Backbone, calls: Calls) -> None:
    """The block's output and its residual add up to what the next norm is given."""
    spec = backbone.spec
    blocks = spec.of_kind(SiteKind.BLOCK)
    ends = {block.path for block in blocks}
    ordered = spec.of_kind(SiteKind.NORM, SiteKind.BLOCK)
    parallel = getattr(backbone.model.config, "use_parallel_residual", False)
    cross = sum(".cross." in block.name for block in blocks)
    assert len(blocks) - cross == 2 * spec.layers * (2 if spec.kind == "encoder-decoder" else 1)
    for block in blocks:
        last = (".outer_norm",) if spec.family in OUTER_NORMS else (".attn.o", ".mlp.down", ".cross.o")
        assert spec.by_path[block.path].name.endswith(last)
        residual, gave = calls.given[block.residual], calls.gave[block.path]
        if spec.pre_norm:
            later = ordered[ordered.index(block) + 1 :]
            following = next(
                s.path for s in later if s.kind is SiteKind.NORM and not s.heads_axis and s.path not in ends
            )
            normed = block.residual != block.inner  # ModernBERT's first layer has no norm
            assert calls.given[block.inner] is (calls.gave[block.residual] if normed else residual)
        else:
            following = block.norm
            assert calls.given[block.inner] is residual
        if parallel and block.name.endswith("attn.out"):
            assert calls.given[following] is residual  # to which the feed-forward's output is added as well
            continue
        if parallel:
            gave = gave + calls.gave[spec.sites[block.name.replace("mlp.out", "attn.o")].path]
        assert torch.equal((gave + residual).view(-1), calls.given[following].view(-1))


def test_keys_and_values(backbone: Backbone, calls: Calls) -> None:
    spec = backbone.spec
    sites = spec.of_kind(SiteKind.KV)
    assert [site.path for site in sites] == list(calls.attended)
    for site in sites:
        keys, values = calls.attended[site.path]
        assert site.in_features == site.out_features == keys.shape[1] == spec.kv_heads * spec.head_dim
        stem = site.name.removesuffix("kv")
        assert torch.equal(values, made(spec, stem, "v", calls))
        if spec.family not in ROTARY:  # whose keys are rotated before they attend
            assert torch.equal(keys, made(spec, stem, "k", calls))
        if ".cross." in site.name:
            assert len(keys) == ENCODED
            last = "encoder.norm" if spec.pre_norm else f"encoder.layers.{spec.layers - 1}.mlp.norm"
            assert calls.given[spec.sites[f"{stem}k"].path] is calls.gave[spec.sites[last].path]


def made(spec: BackboneSpec, stem: str, leaf: str, calls: Calls) -> Tensor:
    """Keys or values ``[tokens, width]`` as the linears give them."""
    if spec.family != "gpt_neox":
        return output(spec.sites[f"{stem}{leaf}"], calls)
    fused = output(
        spec.sites[f"{stem}qkv"], calls
    )  # query, key and value of the first head, of the second, ...
    return fused.view(len(fused), spec.heads, 3, spec.head_dim)[:, :, "qkv".index(leaf)].flatten(1)


def output(site: Site, calls: Calls) -> Tensor:
    """A linear site's own columns of what its module gave, ``[tokens, out]``."""
    return calls.gave[site.path][0, :, site.offset : site.offset + site.out_features]


def test_paths_with_and_without_the_base_models_name(backbone: Backbone) -> None:
    model, spec = backbone
    for site in spec.by_path.values():
        assert spec.site_at(site.path) is site
        below = site.path.removeprefix(f"{spec.base_prefix}.")
        assert spec.site_at(below) is site
    if spec.base_prefix:
        assert spec.base_prefix == model.base_model_prefix
    assert spec.site_at("nowhere") is None


def test_every_family_is_here() -> None:
    names = {name.removesuffix("_gated") for name in MODELS} | {tiny.family_of(n) for n in tiny.CONFIGS}
    assert families() == sorted(names)


def test_norms_of_heads(backbone: Backbone, calls: Calls) -> None:
    """The heads are where the table says, and each norm is given rows of one head's width."""
    spec = backbone.spec
    norms = [site for site in spec.of_kind(SiteKind.NORM) if site.heads_axis]
    assert len(norms) == (2 * spec.layers if spec.family in ("qwen3", "gemma3_text") else 0)
    for site in norms:
        heads = spec.heads if site.name.endswith("q_norm") else spec.kv_heads
        shape = list(calls.given[site.path].shape)
        assert shape.pop(site.heads_axis) == heads
        assert shape == [1, TOKENS, spec.head_dim]


def test_embeddings_are_scaled_as_the_table_says(backbone: Backbone, calls: Calls) -> None:
    for name in ("embed", "encoder.embed", "decoder.embed"):
        site = backbone.spec.sites.get(name)
        if site is not None and site.path in calls.gave:
            looked_up = backbone.model.get_submodule(site.path).weight[calls.given[site.path]]
            torch.testing.assert_close(calls.gave[site.path], looked_up * site.scale)
