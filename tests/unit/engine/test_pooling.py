"""Pooling by the files that sentence-transformers writes beside a backbone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from server.engine.pooling import Embedder, read_embedder
from server.errors import InvalidRequest


def sentence_files(
    folder: Path, pooling: dict[str, object] | None, *, normalise: bool, longest: int | None = None
) -> Path:
    modules = [{"type": "sentence_transformers.models.Transformer", "path": ""}]
    if pooling is not None:
        modules.append({"type": "sentence_transformers.models.Pooling", "path": "1_Pooling"})
        (folder / "1_Pooling").mkdir()
        (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    if normalise:
        modules.append({"type": "sentence_transformers.models.Normalize", "path": "2_Normalize"})
    (folder / "modules.json").write_text(json.dumps(modules))
    if longest is not None:
        (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": longest}))
    return folder


@pytest.mark.parametrize(
    ("pooling", "normalise", "wanted"),
    [
        (
            {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False},
            True,
            Embedder(("mean",), True, 99),
        ),
        ({"pooling_mode_cls_token": True}, False, Embedder(("cls",), False, 99)),
        (
            {"pooling_mode_cls_token": True, "pooling_mode_max_tokens": True},
            True,
            Embedder(("cls", "max"), True, 99),
        ),
        ({"pooling_mode": "max", "embedding_dimension": 32}, False, Embedder(("max",), False, 99)),
        ({"pooling_mode": ["mean", "cls"]}, False, Embedder(("mean", "cls"), False, 99)),
        (
            {"pooling_mode_mean_tokens": True, "pooling_mode_max_tokens": True},
            False,
            Embedder(("max", "mean"), False, 99),
        ),
        ({"embedding_dimension": 32}, False, Embedder(("mean",), False, 99)),
        (None, True, Embedder(("mean",), True, 99)),
    ],
)
def test_sentence_transformers_files(
    pooling: dict[str, object] | None, normalise: bool, wanted: Embedder, tmp_path: Path
) -> None:
    assert read_embedder(sentence_files(tmp_path, pooling, normalise=normalise, longest=99)) == wanted


def test_without_files_the_mean_and_no_norm(tmp_path: Path) -> None:
    assert read_embedder(tmp_path) == Embedder(("mean",), False, None)


@pytest.mark.parametrize(
    "pooling", [{"pooling_mode_lasttoken": True}, {"pooling_mode": "weightedmean"}, {"pooling_mode": []}]
)
def test_other_pooling_is_refused(pooling: dict[str, object], tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="pooling is") as caught:
        read_embedder(sentence_files(tmp_path, pooling, normalise=False))
    assert caught.value.param == "backbone"


def test_other_modules_are_refused(tmp_path: Path) -> None:
    sentence_files(tmp_path, None, normalise=False)
    (tmp_path / "modules.json").write_text(
        '[{"type": "sentence_transformers.models.Dense", "path": "2_Dense"}]'
    )
    with pytest.raises(InvalidRequest, match="Dense"):
        read_embedder(tmp_path)


def test_lower_case_is_the_tokenizers_work(tmp_path: Path) -> None:
    sentence_files(tmp_path, None, normalise=False)
    (tmp_path / "sentence_bert_config.json").write_text('{"max_seq_length": 9, "do_lower_case": true}')
    with pytest.raises(InvalidRequest, match="do_lower_case"):
        read_embedder(tmp_path)


def test_embedder() -> None:
    hidden = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    joined = torch.cat([hidden[0], hidden.mean(0), hidden.max(0).values])
    assert torch.allclose(Embedder(("cls", "mean", "max"))(hidden), joined)
    assert torch.allclose(Embedder(("cls", "mean", "max"), True)(hidden), joined / joined.norm())
