"""What was trained to generate is what is served: the engine's runners of decoders and encoder-decoders."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from deltas.delta import Delta
from deltas.formats import native
from server.tuning.forward import Generated, Part
from server.tuning.messages import Finished
from server.tuning.run import Run
from server.tuning.spec import Example
from tests import tuning
from tests.oracle import rows as decoders
from tests.oracle import seq2seq_rows
from tests.oracle.padded import BACKBONES, PaddedRow

METHODS = ("lora", "bottleneck", "prompt", "prefix", "bitfit", "ia3", "diff_pruning")


def by_decoder(delta: Delta, examples: list[Example]) -> Tensor:
    """Each answer's losses, a token at a time behind what is before it."""
    runner = decoders.make_runner(BACKBONES / "llama", torch.float32, capacity=48)
    packed = decoders.place(runner, delta)
    asked = [(row, at) for row in examples for at in range(*row.learn[0])]
    served = [decoders.Row(row.tokens[:at], packed) for row, at in asked]
    decoders.generate(runner, served, 1)
    logits = torch.stack([row.logits[0] for row in served])
    return F.cross_entropy(logits, torch.tensor([row.tokens[at] for row, at in asked]), reduction="none")


def by_seq2seq(delta: Delta, examples: list[Example]) -> Tensor:
    runner = seq2seq_rows.make_runner(BACKBONES / "t5")
    packed = seq2seq_rows.place(runner, delta)
    served = [PaddedRow(row.tokens, packed, [0, *row.target[:-1]]) for row in examples]
    logits = torch.cat(seq2seq_rows.score(runner, served))
    wanted = torch.tensor([token for row in examples for token in row.target])
    return F.cross_entropy(logits, wanted, reduction="none")


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("family", ["llama", "t5"])
def test_the_same_losses(family: str, name: str, tmp_path: Path) -> None:
    passes = tuning.passes_of(family)
    kind = passes.backbone.spec.kind
    rows, others = (tuning.examples("generate", 12, seed, kind=kind) for seed in (0, 9))
    spec = tuning.job(tmp_path, [tuning.method(passes, name)], "generate", rows, epochs=3, learning_rate=1e-2)
    run = Run.open(spec, tmp_path, passes)
    finished = tuning.train(passes, run)[-1]
    assert isinstance(finished, Finished)
    with torch.no_grad():
        trained = passes.bind(run._components.patches(None))
        own, plain = passes([Part("generate", others, trained), Part("generate", others, passes.bind([]))])
    assert isinstance(own, Generated)
    assert isinstance(plain, Generated)
    served = {"llama": by_decoder, "t5": by_seq2seq}[family](native.load(Path(finished.file)), others)
    torch.testing.assert_close(served, own.losses, rtol=1e-4, atol=1e-4)
    assert float((own.losses - plain.losses).abs().max()) > 1e-2
