"""Tokenizers of the three families, loaded once."""

from __future__ import annotations

from pathlib import Path

import pytest

from server.engine.tokenizer import Tokenizer
from tests.encoders import write_encoder
from tests.seq2seq import write_t5
from tests.tiny import write_backbone
from tests.unit.tuning.data.preparing import Job


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer(write_backbone(tmp_path_factory.mktemp("llama")))


@pytest.fixture(scope="session")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer(write_encoder(tmp_path_factory.mktemp("bert") / "model", "bert"))


@pytest.fixture(scope="session")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer(write_t5(tmp_path_factory.mktemp("t5") / "model"))


@pytest.fixture
def decoder(tmp_path: Path, llama: Tokenizer) -> Job:
    return Job(tmp_path, llama, "decoder")


@pytest.fixture
def encoder(tmp_path: Path, bert: Tokenizer) -> Job:
    return Job(tmp_path, bert, "encoder")


@pytest.fixture
def seq2seq(tmp_path: Path, t5: Tokenizer) -> Job:
    return Job(tmp_path, t5, "encoder-decoder")
