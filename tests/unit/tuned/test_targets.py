"""What a target names."""

from __future__ import annotations

import pytest

from deltas.errors import InvalidDelta, UnsupportedDelta
from deltas.sites import SiteKind
from deltas.tuned import TUNABLE, before_head, tunable
from tests.tunables import FAMILIES, weights_of


def names(method: str, family: str, *targets: str) -> list[str]:
    found = tunable(method).sites(list(targets) or None, weights_of(family).spec)
    return [site.name for site in found]


@pytest.mark.parametrize(
    ("family", "targets", "expected"),
    [
        ("llama", ["layers.1.attn.q"], ["layers.1.attn.q"]),
        ("llama", ["q"], ["layers.0.attn.q", "layers.1.attn.q"]),
        ("llama", ["q_proj"], ["layers.0.attn.q", "layers.1.attn.q"]),
        ("llama", ["model.layers.1.self_attn.q_proj"], ["layers.1.attn.q"]),
        ("llama", ["layers.1.mlp"], ["layers.1.mlp.gate", "layers.1.mlp.up", "layers.1.mlp.down"]),
        ("llama", ["lm_head", "v", "layers.0.attn.v"], ["layers.0.attn.v", "layers.1.attn.v", "head"]),
        ("bert", ["query"], ["layers.0.attn.q", "layers.1.attn.q"]),
        ("bert", ["intermediate.dense"], ["layers.0.mlp.up", "layers.1.mlp.up"]),
        ("gpt2", ["c_attn"], ["layers.0.attn.qkv", "layers.1.attn.qkv"]),
        ("gpt2", ["attn.v"], ["layers.0.attn.v", "layers.1.attn.v"]),
        ("t5", ["cross.q"], ["decoder.layers.0.cross.q", "decoder.layers.1.cross.q"]),
    ],
)
def test_names_of_sites_and_of_modules(family: str, targets: list[str], expected: list[str]) -> None:
    assert names("lora", family, *targets) == expected


def test_words() -> None:
    assert names("lora", "gpt2", "all-linear") == names("lora", "gpt2", "linears") == names("lora", "gpt2")
    assert names("bitfit", "bert", "norms") == names("ln", "bert")
    assert "norm" in names("ln", "llama")
    spec = weights_of("bert").spec
    assert all(spec.sites[name].bias for name in names("bitfit", "bert", "biases"))
    with pytest.raises(InvalidDelta, match="biases"):  # a Llama has none
        names("bitfit", "llama", "biases")


@pytest.mark.parametrize("family", FAMILIES)
def test_default_targets_spare_the_head_and_what_is_refused(family: str) -> None:
    for name in TUNABLE.keys() - {"head", "prompt", "selective_module"}:
        if (name, family) != ("prefix", "modernbert"):  # whose keys and values are refused
            spec = weights_of(family).spec
            sites = tunable(name).sites(None, spec)
            assert sites
            assert not [site.name for site in sites if site.refused or site.name.startswith("head")]


def test_default_targets() -> None:
    assert names("ia3", "gpt_neox")[:2] == ["layers.0.attn.qkv", "layers.0.mlp.down"]
    assert names("last_layer", "bert")[0] == "layers.1.attn.q"
    last = names("last_layer", "t5")
    assert {name.split(".")[2] for name in last} == {"1"}
    assert {name.split(".")[0] for name in last} == {"encoder", "decoder"}
    assert names("seq_bn", "bert") == ["layers.0.mlp.out", "layers.1.mlp.out"]
    assert names("prompt", "t5") == ["encoder.embed"]
    assert len(names("lora", "gpt2")) == 2 * 4  # the fused linear whole


@pytest.mark.parametrize(
    ("method", "family", "targets"),
    [
        ("lora", "llama", []),
        ("lora", "llama", ["attn.out"]),  # a block, not a linear
        ("lora", "llama", ["3"]),
        ("head", "llama", ["q"]),
        ("prompt", "llama", ["head"]),
        ("masking", "gpt2", ["c_attn", "attn.q"]),
        ("selective_module", "bert", None),
        ("prefix", "modernbert", None),
    ],
)
def test_targets_that_cannot_be(method: str, family: str, targets: list[str] | None) -> None:
    with pytest.raises(InvalidDelta) as wrong:
        tunable(method).sites(targets, weights_of(family).spec)
    assert wrong.value.field == "targets"


def test_refused_sites_say_why() -> None:
    spec = weights_of("modernbert").spec
    with pytest.raises(UnsupportedDelta, match=spec.of_kind(SiteKind.KV)[0].refused[:20]) as refused:
        tunable("prefix").sites(["attn.kv"], spec)
    assert refused.value.field == "targets"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_task_head_reads_no_decoder_and_no_output_head(family: str) -> None:
    spec = before_head(weights_of(family).spec)
    for name in TUNABLE.keys() - {"selective_module"}:
        if (name, family) != ("prefix", "modernbert"):
            sites = tunable(name).sites(None, spec)
            assert not [site.name for site in sites if site.name.startswith(("decoder.", "head"))]
            assert sites or name == "head"
    with pytest.raises(InvalidDelta):
        tunable("lora").sites(["head"], spec)
