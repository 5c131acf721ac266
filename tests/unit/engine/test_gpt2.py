"""GPT-2 in the engine: packed rows, chunks and decode steps give what Hugging Face's own GPT-2 gives, deltas included.

The reference is the stock model with forward hooks that compute each delta's formula from its canonical tensors; where
GPT-2 keeps a site is written out again here, apart from the product's table.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers import GPT2LMHeadModel

from deltas.delta import Component, Delta
from deltas.ops import Mode
from server.engine.runner import Runner
from tests.oracle.rows import Row, generate, make_runner, place, same

BACKBONE = Path(__file__).parents[2] / "oracle" / "fixtures" / "backbones" / "gpt2"
HIDDEN, INNER, LAYERS, VOCAB, POSITIONS = 32, 48, 2, 61, 48
STEPS = 6
TOLERANCE = 1e-5

# site in a layer -> module, first column, columns in, columns out
LINEARS = {
    "attn.qkv": ("attn.c_attn", 0, HIDDEN, 3 * HIDDEN),
    "attn.q": ("attn.c_attn", 0, HIDDEN, HIDDEN),
    "attn.k": ("attn.c_attn", HIDDEN, HIDDEN, HIDDEN),
    "attn.v": ("attn.c_attn", 2 * HIDDEN, HIDDEN, HIDDEN),
    "attn.o": ("attn.c_proj", 0, HIDDEN, HIDDEN),
    "mlp.up": ("mlp.c_fc", 0, HIDDEN, INNER),
    "mlp.down": ("mlp.c_proj", 0, INNER, HIDDEN),
}
NORMS = {"attn.norm": "ln_1", "mlp.norm": "ln_2"}
# block in a layer -> its last module, the norm that is given the residual, its first module
BLOCKS = {"attn.out": ("attn.c_proj", "ln_1", "attn.c_attn"), "mlp.out": ("mlp.c_proj", "ln_2", "mlp.c_fc")}


def draw(make: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=make) * 0.3


def lora(seed: int, rank: int, *sites: str) -> Component:
    make = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(LAYERS):
        for site in sites:
            _, _, width, out = LINEARS[site]
            tensors[f"layers.{layer}.{site}/A"] = draw(make, rank, width)
            tensors[f"layers.{layer}.{site}/B"] = draw(make, out, rank)
    return Component("lora", {"scale": 0.7}, tensors)


def bitfit(seed: int) -> Component:
    make = torch.Generator().manual_seed(seed)
    tensors = {"norm/beta": draw(make, HIDDEN), "head/beta": draw(make, VOCAB)}
    for layer in range(LAYERS):
        for site, (_, _, _, out) in LINEARS.items():
            tensors[f"layers.{layer}.{site}/beta"] = draw(make, out)
        for site in NORMS:
            tensors[f"layers.{layer}.{site}/beta"] = draw(make, HIDDEN)
    return Component("bitfit", {}, tensors)


def bottleneck(seed: int, width: int, reads: str) -> Component:
    make = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(LAYERS):
        for site in BLOCKS:
            name = f"layers.{layer}.{site}"
            tensors[f"{name}/down"] = draw(make, width, HIDDEN)
            tensors[f"{name}/down_bias"] = draw(make, width)
            tensors[f"{name}/up"] = draw(make, HIDDEN, width)
            tensors[f"{name}/up_bias"] = draw(make, HIDDEN)
    return Component("bottleneck", {"activation": "gelu", "reads": reads, "scale": 1.5}, tensors)


def prompt(seed: int, length: int) -> Component:
    return Component("prompt", {}, {"embeddings": draw(torch.Generator().manual_seed(seed), length, HIDDEN)})


DELTAS: Mapping[str, Delta] = {
    "whole": Delta((lora(1, 4, "attn.qkv", "attn.o"),)),
    "parts": Delta((lora(2, 3, "attn.q", "attn.v"),)),
    "every": Delta((lora(3, 5, *LINEARS),)),
    "bitfit": Delta((bitfit(4),)),
    "after": Delta((bottleneck(5, 6, "output"),)),
    "added": Delta((bottleneck(6, 7, "output+residual"),)),
    "beside": Delta((bottleneck(7, 5, "residual"),)),
    "inside": Delta((bottleneck(8, 4, "inner"),)),
    "prompt": Delta((prompt(9, 7),)),
    "prompt and lora": Delta((prompt(10, 3), lora(11, 2, "attn.k", "mlp.up", "mlp.down"))),
}


def stock(folder: Path = BACKBONE) -> Any:
    """Hugging Face's own model, untouched by ours."""
    return GPT2LMHeadModel.from_pretrained(folder, attn_implementation="eager").eval()


@contextmanager
def reference(model: Any, delta: Delta) -> Iterator[Tensor | None]:
    """The stock model computing with a delta; yields the embeddings that come before a row's own."""
    handles: list[Any] = []
    before = None
    for component in delta.components:
        if component.method == "prompt":
            before = component.tensors["embeddings"]
            continue
        for name in component.sites():
            handles += _hook(model, name, component, component.at(name))
    yield before
    for handle in handles:
        handle.remove()


def _hook(model: Any, name: str, component: Component, tensors: Mapping[str, Tensor]) -> list[Any]:
    if name in ("norm", "head"):
        module = model.transformer.ln_f if name == "norm" else model.lm_head
        return [module.register_forward_hook(_adds(lambda _: tensors["beta"], 0))]
    layer = model.transformer.h[int(name.split(".")[1])]
    site = name.split(".", 2)[2]
    if component.method == "bottleneck":
        return _bottleneck(layer, BLOCKS[site], component, tensors)
    module, first = (NORMS[site], 0) if site in NORMS else LINEARS[site][:2]
    if component.method == "bitfit":
        return [layer.get_submodule(module).register_forward_hook(_adds(lambda _: tensors["beta"], first))]
    scale = component.config["scale"]
    change = _adds(lambda x: scale * (x @ tensors["A"].T @ tensors["B"].T), first)
    return [layer.get_submodule(module).register_forward_hook(change)]


def _adds(change: Callable[[Tensor], Tensor], first: int) -> Callable[..., Tensor]:
    """A hook that adds ``change(input)`` to the columns from ``first`` on."""

    def hook(_: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        added = change(args[0])
        result = output.clone()
        result[..., first : first + added.shape[-1]] += added
        return result

    return hook


def _bottleneck(
    layer: Any, places: tuple[str, str, str], component: Component, t: Mapping[str, Tensor]
) -> list[Any]:
    last, norm, inner = (layer.get_submodule(path) for path in places)
    seen: dict[str, Tensor] = {}

    def note(key: str) -> Callable[..., None]:
        def hook(_: Any, args: tuple[Tensor, ...]) -> None:
            seen[key] = args[0]

        return hook

    def change(_: Any, __: Any, h: Tensor) -> Tensor:
        z = {
            "output": h,
            "output+residual": h + seen["i"],
            "residual": seen["i"],
            "inner": seen["entered"],
        }[component.config["reads"]]
        inside = functional.gelu(functional.linear(z, t["down"], t["down_bias"]))
        changed: Tensor = h + component.config["scale"] * functional.linear(inside, t["up"], t["up_bias"])
        return changed

    return [
        norm.register_forward_pre_hook(note("i")),
        inner.register_forward_pre_hook(note("entered")),
        last.register_forward_hook(change),
    ]


@torch.no_grad()
def greedy(model: Any, tokens: list[int], before: Tensor | None = None) -> list[Tensor]:
    """The logits of each greedy step, each by a full pass without a cache."""
    ids, found = list(tokens), []
    for _ in range(STEPS):
        embedded = model.transformer.wte(torch.tensor([ids]))
        if before is not None:
            embedded = torch.cat([before[None], embedded], dim=1)
        logits = model(inputs_embeds=embedded, use_cache=False).logits[0, -1]
        found.append(logits)
        ids.append(int(logits.argmax()))
    return found


def texts(count: int, seed: int = 3) -> list[list[int]]:
    rng = random.Random(seed)
    lengths = [1, 2, 30, 5, 17, 33]
    return [[rng.randrange(VOCAB) for _ in range(lengths[i % len(lengths)])] for i in range(count)]


def runner_of(folder: Path, mode: Mode | None = None) -> Runner:
    return make_runner(folder, torch.float32, mode, capacity=POSITIONS)


@pytest.mark.parametrize("mode", ["native", "dense", "reference"])
def test_mixed_equals_alone_equals_hugging_face(mode: Mode) -> None:
    runner = runner_of(BACKBONE, mode)
    packed = {name: place(runner, delta) for name, delta in DELTAS.items()}
    names = [*packed, "base", "base", "whole", "every", "prompt"]
    random.Random(7).shuffle(names)
    rows = [Row(t, packed.get(name), name) for name, t in zip(names, texts(len(names)), strict=True)]
    generate(runner, rows, STEPS, chunk=37)
    model = stock()
    for row in rows:
        alone = Row(row.prompt, row.delta, row.name)
        generate(runner, [alone], STEPS)
        if row.delta is None:
            expected = greedy(model, row.prompt)
        else:
            with reference(model, DELTAS[row.name]) as before:
                expected = greedy(model, row.prompt, before)
            assert same(greedy(model, row.prompt)[0], row.logits[0]) > 0.01, f"{row.name} changes nothing"
        for step, source in enumerate(expected):
            assert same(row.logits[step], source) < TOLERANCE, (row.name, len(row.prompt), step)
            assert same(alone.logits[step], source) < TOLERANCE, (row.name, len(row.prompt), step)
        assert row.tokens == alone.tokens


@pytest.mark.parametrize(
    "options",
    [
        {"scale_attn_by_inverse_layer_idx": True},
        {"scale_attn_weights": False},
        {"reorder_and_upcast_attn": True},
    ],
)
def test_options_of_the_configuration(options: dict[str, bool], tmp_path: Path) -> None:
    shutil.copytree(BACKBONE, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | options))
    rows = [Row(t) for t in texts(6)]
    generate(runner_of(tmp_path), rows, STEPS, chunk=20)
    model = stock(tmp_path)
    for row in rows:
        for ours, source in zip(row.logits, greedy(model, row.prompt), strict=True):
            assert same(ours, source) < TOLERANCE


def test_weights_and_names_stay() -> None:
    """The hooked model's state dict is the file's, ``Conv1D`` weights as they were."""
    runner = runner_of(BACKBONE)
    ours, stocks = runner.backbone.model.state_dict(), stock().state_dict()
    assert list(ours) == list(stocks)
    assert all(torch.equal(ours[key], stocks[key]) for key in stocks)


def test_a_row_may_fill_the_position_table() -> None:
    row = Row(texts(1, seed=5)[0] * (POSITIONS - STEPS + 1))
    generate(runner_of(BACKBONE), [row], STEPS)
    model = stock()
    for ours, source in zip(row.logits, greedy(model, row.prompt), strict=True):
        assert same(ours, source) < TOLERANCE
