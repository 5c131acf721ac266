"""The parts of the encoder-decoders' runner: biases, shared sources, what a checkpoint must say."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSeq2SeqLM

from deltas import methods
from deltas.delta import Component, Delta
from deltas.errors import InvalidDelta, UnsupportedDelta
from deltas.patches import KVPrefix
from server.engine.backbone import BackboneError, load
from server.engine.build_seq2seq import decoder_start
from server.engine.t5_bias import KEPT_ELEMENTS, Before, RelativeBias, TokenBias
from server.errors import InvalidRequest
from tests.oracle.padded import BACKBONES, PaddedRow
from tests.oracle.rows import same
from tests.oracle.seq2seq_rows import make_runner, place, runner_of, score
from tests.seq2seq import source_of, write_t5

CPU = torch.device("cpu")


def first_attention(stack: str) -> torch.nn.Module:
    model = AutoModelForSeq2SeqLM.from_pretrained(BACKBONES / "t5")
    found: torch.nn.Module = getattr(model, stack).block[0].layer[0].SelfAttention
    return found


def prefix(length: int, *, shifts_positions: bool = False, **flags: bool) -> KVPrefix:
    nothing = torch.zeros(length, 4, 8)
    return KVPrefix("encoder.layers.0.attn.kv", nothing, nothing, shifts_positions, **flags)


@torch.no_grad()
@pytest.mark.parametrize("stack", ["encoder", "decoder"])
def test_biases_are_hugging_faces(stack: str) -> None:
    attention = first_attention(stack)
    bias = RelativeBias(attention)
    for length in (1, 2, 40, 300):
        assert torch.equal(bias.square(length), attention.compute_bias(length, length)[0])
    n, length = 7, 200
    own = attention.compute_bias(length, length)[0]
    nothing = torch.zeros(4, length, n)
    assert torch.equal(bias.behind(prefix(n), length), torch.cat([nothing, own], dim=2))
    shifted = attention.compute_bias(length, n + length, past_seen_tokens=n)[0]
    assert torch.equal(bias.behind(prefix(n, shifts_positions=True), length), shifted)
    keys = attention.compute_bias(length, n + length, past_seen_tokens=0)[0]
    assert torch.equal(bias.behind(prefix(n, shifts_keys=True), length), keys)
    assert not bias.behind(prefix(n, unbiased=True), length).any()


@torch.no_grad()
def test_biases_of_ragged_rows() -> None:
    attention = first_attention("decoder")
    bias = RelativeBias(attention)
    before = [Before(), Before.of(prefix(5, shifts_positions=True)), Before.of(prefix(3))]
    starts, counts = [150, 0, 6], [1, 2, 1]
    found = TokenBias.of(bias, before, starts, counts, CPU)(slice(0, 4), 160)
    whole = attention.compute_bias(160, 160)[0]
    for token, place_ in ((0, 150), (1, 5), (2, 6)):
        assert torch.equal(found[:, token, : place_ + 1], whole[:, place_, : place_ + 1])
    assert not found[:, 3, :3].any()
    assert torch.equal(found[:, 3, 3:10], whole[:, 6, :7])


def test_kept_biases_are_bounded() -> None:
    bias = RelativeBias(first_attention("encoder"))
    for length in range(300, 500, 20):
        bias.square(length)
    kept = sum(square.numel() for square in bias._squares.values())
    assert 0 < kept <= KEPT_ELEMENTS


@pytest.mark.parametrize("family", ["bart", "t5"])
def test_rows_of_one_source_and_delta_are_encoded_once(family: str) -> None:
    runner = runner_of(family)
    source, delta = source_of(1, 30), place(runner, lora(runner.backbone.spec.hidden))
    rows = [runner.hold(slot, source, delta if slot % 2 else None) for slot in range(6)]
    other = runner.hold(6, source_of(2, 9), None)
    encoded = runner.encode([*rows, other])
    assert len(encoded) == 2 * len(source) + 9
    for layer in runner.layers:
        for slot in range(2, 6):
            own = runner.cross.keys[layer][slot, :, : len(source)]
            assert torch.equal(own, runner.cross.keys[layer][slot % 2, :, : len(source)])
    assert not torch.equal(runner.cross.keys[0][0, :, :30], runner.cross.keys[0][1, :, :30])


def lora(hidden: int) -> Delta:
    make = torch.Generator().manual_seed(2)
    tensors = {
        "encoder.layers.0.attn.q/A": torch.randn(3, hidden, generator=make),
        "encoder.layers.0.attn.q/B": torch.randn(hidden, 3, generator=make),
    }
    return Delta((Component("lora", {"scale": 1.0}, tensors),))


@pytest.mark.parametrize(
    ("family", "dtype", "longest"),
    [("t5_gated", torch.bfloat16, 200), ("bart", torch.bfloat16, 48), ("bart", torch.float16, 48)],
)
def test_narrow_dtypes(family: str, dtype: torch.dtype, longest: int) -> None:
    runner = make_runner(BACKBONES / family, dtype=dtype)
    model = AutoModelForSeq2SeqLM.from_pretrained(BACKBONES / family, dtype=dtype)
    rows = [
        PaddedRow(source_of(n, length, 2), None, [0, 9, 30, n]) for n, length in enumerate((3, 40, longest))
    ]
    for row, got in zip(rows, score(runner, rows), strict=True):
        with torch.no_grad():
            answer = torch.tensor([row.decoder_ids])
            wanted = model(input_ids=torch.tensor([row.ids]), decoder_input_ids=answer).logits[0]
        assert same(got, wanted.float()) < 0.03


def test_too_many_virtual_tokens_are_refused() -> None:
    runner = runner_of("t5")
    spec = runner.backbone.spec
    shape = (200, spec.kv_heads, spec.head_dim)
    site = "decoder.layers.1.cross.kv"
    long = Component(
        "prefix", {"shifts_positions": False}, {f"{site}/{x}": torch.ones(shape) for x in ("keys", "values")}
    )
    prompt = Component("prompt", {}, {"embeddings": torch.ones(57, spec.hidden)})
    place(runner, Delta((long,)))
    with pytest.raises(InvalidDelta, match="257 virtual tokens") as caught:
        place(runner, Delta((long, prompt)))
    assert caught.value.field == "embeddings"


def test_there_is_no_embedding_norm_to_put_a_prompt_after() -> None:
    spec = runner_of("t5").backbone.spec
    after = Component("prompt", {"after_norm": True}, {"embeddings": torch.ones(3, spec.hidden)})
    with pytest.raises(UnsupportedDelta, match="after the embedding norm") as caught:
        methods.check(Delta((after,)), spec)
    assert caught.value.field == "after_norm"


def test_float16_is_refused_of_t5() -> None:
    with pytest.raises(BackboneError, match="float16") as caught:
        load("t5", BACKBONES / "t5", CPU, torch.float16)
    assert caught.value.param == "dtype"


def test_a_checkpoint_that_does_not_say_how_answers_begin(tmp_path: Path) -> None:
    folder = write_t5(tmp_path / "t5")
    for name in ("config.json", "generation_config.json"):
        config = json.loads((folder / name).read_text())
        del config["decoder_start_token_id"]
        (folder / name).write_text(json.dumps(config))
    with pytest.raises(InvalidRequest, match="decoder_start_token_id"):
        decoder_start(load("t5", folder, CPU, torch.float32))


def test_a_bias_of_the_logits(tmp_path: Path) -> None:
    """BART's is a buffer that not every checkpoint has, and those that have it mostly leave it at zero."""
    folder = BACKBONES / "bart"
    biased = load("bart", folder, CPU, torch.float32)
    assert biased.logits_bias is not None
    shutil.copytree(folder, tmp_path / "bart")
    weights = load_file(folder / "model.safetensors")
    bias = weights.pop("final_logits_bias")
    save_file(weights, tmp_path / "bart" / "model.safetensors", {"format": "pt"})
    plain = load("bart", tmp_path / "bart", CPU, torch.float32)
    assert plain.logits_bias is None
    hidden = torch.randn(3, plain.spec.hidden)
    assert torch.equal(biased.logits(hidden), plain.logits(hidden) + bias)
