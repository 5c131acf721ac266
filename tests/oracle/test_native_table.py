"""The native format's own column of the table: methods that no library stores, against the backbone changed in place.

The truth is Hugging Face's model with its tensors written to (``W += D``, ``W[mask] = 0``), one unpadded row at a time.
Ours is one mixed batch of all cases, through the padded harness on every family and through the engine's runner on a
Llama.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from deltas.delta import Component, Delta
from deltas.methods import METHODS
from deltas.ops import Mode
from deltas.sites import BackboneSpec, Site, SiteKind
from tests.oracle.padded import BACKBONES, CLASSES, PaddedRow, PaddedRunner
from tests.oracle.rows import Row, generate, make_runner, place, same

FAMILIES = ["llama", "gpt2", "bert", "roberta", "distilbert", "modernbert", "bart", "t5", "t5_gated"]
TOLERANCE = 1e-5
STEPS = 5
PROMPTS = ([5, 9, 44], [11], [60, 3, 17, 17, 8, 30, 4, 21, 50, 13, 7])
DECODER_PROMPTS = ([7, 4], [3, 58, 22, 9], [6])

Case = tuple[Delta, Callable[[nn.Module], None]]


class Edited:
    """A module's weight as ``[out, in]`` (``[n]``, ``[rows, width]``) and its bias, to be written to."""

    def __init__(self, model: nn.Module, site: Site) -> None:
        self._module = model.get_submodule(site.path)
        weight: Tensor = self._module.weight.data  # type: ignore[assignment,union-attr]
        conv = type(self._module).__name__ == "Conv1D"
        self._rows = slice(site.offset, site.offset + site.out_features) if site.part else slice(None)
        self.weight = (weight.T if conv else weight)[self._rows]

    @property
    def bias(self) -> Tensor:
        """The bias, zeros where the model has none."""
        if self._module.bias is None:
            self._module.bias = nn.Parameter(torch.zeros(len(self._module.weight)))  # type: ignore[arg-type]
        bias: Tensor = self._module.bias.data  # type: ignore[assignment,union-attr]
        return bias[self._rows]


def draw(seed: str) -> torch.Generator:
    return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(seed.encode()).digest()[:4], "little"))


def normal(name: str, *shape: int, std: float = 0.3) -> Tensor:
    return torch.randn(shape, generator=draw(name)) * std


def some_places(name: str, shape: tuple[int, ...], share: float) -> Tensor:
    """Different places in a tensor of this shape, in no order: int64 ``[dimensions, n]``."""
    size = torch.Size(shape).numel()
    flat = torch.randperm(size, generator=draw(name))[: max(1, round(share * size))]
    return torch.stack(torch.unravel_index(flat, shape))


def linears(spec: BackboneSpec) -> list[Site]:
    """Those of the layers, the fused ones and some of their parts."""
    found = [s for s in spec.of_kind(SiteKind.LINEAR) if "layers." in s.name]
    return [s for s in found if not s.part or (".1." in s.name and s.name.endswith((".q", ".v", ".gate")))]


def with_bias(spec: BackboneSpec) -> list[Site]:
    return [s for s in spec.of_kind(SiteKind.LINEAR, SiteKind.NORM) if s.bias and not s.part]


def embeddings(spec: BackboneSpec) -> list[Site]:
    return [s for s in spec.of_kind(SiteKind.EMBEDDING) if not s.refused]


def component(method: str, tensors: Mapping[str, Tensor], config: Mapping[str, Any] | None = None) -> Delta:
    return Delta((Component(method, METHODS[method].normalise(config or {}), dict(tensors)),))


def sparse(sites: list[Site], biases: list[Site], share: float, name: str) -> Case:
    """Diff pruning."""
    tensors: dict[str, Tensor] = {}
    for site in sites:
        tensors[f"{site.name}/indices"] = where = some_places(name + site.name, site.weight_shape, share)
        tensors[f"{site.name}/values"] = normal(name + site.name, where.shape[1], std=1.0)
    for site in biases:
        tensors[f"{site.name}/bias_indices"] = where = some_places(
            name + site.name, (site.out_features,), 0.3
        )
        tensors[f"{site.name}/bias_values"] = normal(name + site.name, where.shape[1], std=1.0)

    def edit(model: nn.Module) -> None:
        for site in sites:
            where = tuple(tensors[f"{site.name}/indices"])
            Edited(model, site).weight[where] += tensors[f"{site.name}/values"]
        for site in biases:
            where = tuple(tensors[f"{site.name}/bias_indices"])
            Edited(model, site).bias[where] += tensors[f"{site.name}/bias_values"]

    return component("diff_pruning", tensors), edit


def masked(sites: list[Site], biases: list[Site], share: float, name: str) -> Case:
    tensors = {f"{s.name}/indices": some_places(name + s.name, s.weight_shape, share) for s in sites}
    tensors |= {f"{s.name}/bias_indices": some_places(name + s.name, (s.out_features,), 0.3) for s in biases}

    def edit(model: nn.Module) -> None:
        for site in sites:
            Edited(model, site).weight[tuple(tensors[f"{site.name}/indices"])] = 0
        for site in biases:
            Edited(model, site).bias[tuple(tensors[f"{site.name}/bias_indices"])] = 0

    return component("masking", tensors), edit


def shira(sites: list[Site]) -> Case:
    tensors: dict[str, Tensor] = {}
    for site in sites:
        count = 2 * (site.in_features + site.out_features)  # rank 2 of a LoRA
        tensors[f"{site.name}/indices"] = some_places(
            site.name, site.weight_shape, count / torch.Size(site.weight_shape).numel()
        )
        tensors[f"{site.name}/values"] = normal(site.name, count)
    scales = {sites[0].name: 0.25}

    def edit(model: nn.Module) -> None:
        for site in sites:
            change = torch.sparse_coo_tensor(
                tensors[f"{site.name}/indices"],
                tensors[f"{site.name}/values"],
                site.weight_shape,
                check_invariants=True,
            )
            Edited(model, site).weight += change.to_dense() * scales.get(site.name, 1.5)

    return component("shira", tensors, {"scale": 1.5, "scales": scales}), edit


def dense(sites: list[Site]) -> Case:
    shifted = [s for s in sites if s.kind is SiteKind.LINEAR or s.bias]
    tensors = {f"{s.name}/matrix": normal(s.name, *s.weight_shape) for s in sites}
    tensors |= {f"{s.name}/beta": normal("beta" + s.name, s.out_features) for s in shifted}

    def edit(model: nn.Module) -> None:
        for site in sites:
            Edited(model, site).weight += tensors[f"{site.name}/matrix"]
        for site in shifted:
            Edited(model, site).bias[:] += tensors[f"{site.name}/beta"]

    return component("dense", tensors), edit


def intrinsic(sites: list[Site], biases: list[Site], *, scaled: bool) -> Case:
    theta, seed, d = normal("theta", 40), 12345, 40
    tensors = {"theta": theta}
    if scaled:
        tensors["scales"] = normal("scales", len(sites) + len(biases), std=0.5) + 1
    config = {
        "seed": seed,
        "scale": 0.5,
        "sites": [s.name for s in sites],
        "biases": [s.name for s in biases],
    }
    targets = [(s, "weight") for s in sites] + [(s, "bias") for s in biases]

    def projected(target: str, count: int) -> Tensor:
        """The projection's definition, in plain integers."""
        mask, found = (1 << 64) - 1, []
        digest = hashlib.sha256(f"deltaserve-intrinsic-1/{seed}/{target}".encode()).digest()
        state = int.from_bytes(digest[:8], "little")
        for _ in range(count):
            state = (state + 0x9E3779B97F4A7C15) & mask
            z = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
            z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
            z ^= z >> 31
            found.append(float(theta[((z >> 32) * d) >> 32]) * (-1 if z & 1 else 1))
        return torch.tensor(found)

    def edit(model: nn.Module) -> None:
        for n, (site, parameter) in enumerate(targets):
            place = Edited(model, site)
            tensor = place.weight if parameter == "weight" else place.bias
            factor = 0.5 * (float(tensors["scales"][n]) if scaled else 1.0)
            tensor += projected(f"{site.name}/{parameter}", tensor.numel()).reshape(tensor.shape) * factor

    return component("intrinsic", tensors, config), edit


def cases(spec: BackboneSpec) -> dict[str, Case]:
    body, norms = linears(spec), spec.of_kind(SiteKind.NORM)
    head = [spec.sites["head"]]
    tables = embeddings(spec)
    last = [s for s in body if ".1.mlp." in s.name]
    biases = with_bias(spec)
    whole = [s for s in body if not s.part]
    unfused = [s for s in body if not s.name.endswith((".qkv", ".gate_up"))]
    return {
        "diff_pruning": sparse(body, [], 0.05, "a"),
        "diff_pruning_of_everything": sparse([*body, *norms, *tables, *head], biases, 0.03, "b"),
        "diff_pruning_few": sparse([*body[-3:], tables[0]], biases[-1:], 0.004, "c"),
        "masking": masked(unfused, [], 0.1, "d"),
        "masking_of_everything": masked([*whole, *norms, *tables, *head], biases, 0.05, "e"),
        "shira": shira([s for s in body if s.name.endswith((".q", ".v", ".qkv"))]),
        "dense_selected": dense([*last, norms[0], norms[-1], *tables]),
        "last_layer": dense(head),
        "intrinsic": intrinsic(body, [], scaled=False),
        "intrinsic_by_target": intrinsic([*body[:3], *norms], biases[1:4] or head, scaled=True),
    }  # fmt: skip


NAMES = [
    "diff_pruning", "diff_pruning_of_everything", "diff_pruning_few", "masking", "masking_of_everything", "shira",
    "dense_selected", "last_layer", "intrinsic", "intrinsic_by_target",
]  # fmt: skip


@cache
def made(family: str) -> dict[str, Case]:
    found = cases(runner(family).spec)
    assert list(found) == NAMES
    return found


@cache
def runner(family: str) -> PaddedRunner:
    return PaddedRunner(family)


def changed(family: str, name: str) -> Any:
    """Hugging Face's own model, its weights untied and changed in place."""
    spec = runner(family).spec
    model = (
        CLASSES[spec.kind]
        .from_pretrained(BACKBONES / family, dtype=torch.float32, attn_implementation="eager")
        .eval()
    )
    for module in model.modules():
        for parameter in ("weight", "bias"):
            tensor = getattr(module, parameter, None)
            if isinstance(tensor, nn.Parameter):
                setattr(module, parameter, nn.Parameter(tensor.detach().clone(), requires_grad=False))
    if name != "base":
        made(family)[name][1](model)
    return model


@cache
@torch.no_grad()
def expected(family: str, name: str) -> list[Tensor]:
    model, found = changed(family, name), []
    for ids, decoder_ids in zip(PROMPTS, DECODER_PROMPTS, strict=True):
        more = (
            {"decoder_input_ids": torch.tensor([decoder_ids])}
            if runner(family).spec.kind == "encoder-decoder"
            else {}
        )
        found.append(model(input_ids=torch.tensor([ids]), **more).logits[0])
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_a_mixed_batch_equals_the_changed_backbones(family: str) -> None:
    batch = []
    for n in range(len(PROMPTS)):  # every case and the base, with every prompt, in turns
        for name in ["base", *NAMES]:
            packed = None if name == "base" else placed(family, name)
            batch.append((name, n, PaddedRow(PROMPTS[n], packed, DECODER_PROMPTS[n], name)))
    for (name, n, _), got in zip(batch, runner(family).logits([row for _, _, row in batch]), strict=True):
        want = expected(family, name)[n]
        assert got.shape == want.shape
        assert same(got, want) < TOLERANCE, (name, n)
        if name != "base":
            assert same(want, expected(family, "base")[n]) > 0.01, f"{name} changes nothing"


@cache
def placed(family: str, name: str) -> Any:
    return runner(family).place(made(family)[name][0])


@pytest.mark.parametrize("mode", ["native", "dense", "reference"])
def test_the_engine_gives_the_same(mode: Mode) -> None:
    engine = make_runner(BACKBONES / "llama", torch.float32, mode)
    rows = [
        Row(list(prompt), None if name == "base" else place(engine, made("llama")[name][0]), name)
        for prompt in PROMPTS
        for name in ["base", *NAMES]
    ][:32]
    generate(engine, rows, STEPS, chunk=40)
    for row in rows:
        for step, want in enumerate(greedy(row.name, tuple(row.prompt))):
            assert same(row.logits[step], want) < TOLERANCE, (row.name, len(row.prompt), step)


@cache
@torch.no_grad()
def greedy(name: str, prompt: tuple[int, ...]) -> list[Tensor]:
    model, ids, found = changed("llama", name), list(prompt), []
    for _ in range(STEPS):
        found.append(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1])
        ids.append(int(found[-1].argmax()))
    return found
