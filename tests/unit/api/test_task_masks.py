"""Words at a mask, for a tokenizer in which a word behind a space is another token than the word alone."""

from __future__ import annotations

from array import array
from pathlib import Path

import pytest
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as RustTokenizer
from transformers import PreTrainedTokenizerFast

from server.api.tasks.encoded import Encoded
from server.api.tasks.masks import MaskedClass
from server.engine.templates import Template
from server.engine.tokenizer import Tokenizer
from server.errors import InvalidRequest, UnsupportedTask
from server.types import EncodedText, Vector
from tests.tiny import write_backbone

MERGES = [("Ġ", "g"), ("Ġg", "o"), ("Ġgo", "o"), ("Ġgoo", "d"), ("b", "a"), ("ba", "d")]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """As RoBERTa's: bytes, with a mask that takes the space before it."""
    folder = tmp_path_factory.mktemp("tokenizer")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {text: n for n, text in enumerate([*alphabet, *(a + b for a, b in MERGES)])}
    made = RustTokenizer(models.BPE(vocab=vocab, merges=MERGES))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=made, mask_token=AddedToken("<mask>", lstrip=True, special=True)
    ).save_pretrained(folder)
    return Tokenizer(folder)


def tokens(tokenizer: Tokenizer, way: MaskedClass) -> list[str]:
    return [tokenizer.token_text(token) for token in way.candidates]


def test_a_word_is_what_it_is_at_the_mask(tokenizer: Tokenizer) -> None:
    way = MaskedClass.of(Template.of("{text} It was [MASK]."), {"yes": ["good"]}, tokenizer)
    assert tokens(tokenizer, way) == [" good"]
    assert (
        MaskedClass.of(Template.of("{text} <mask>"), {"yes": ["good"]}, tokenizer).candidates
        == way.candidates
    )
    way = MaskedClass.of(Template.of("{text}[MASK]"), {"no": ["bad"]}, tokenizer)
    assert tokens(tokenizer, way) == ["bad"]
    for template, word in (("{text} [MASK]", "bad"), ("{text}[MASK]", "good")):
        with pytest.raises(InvalidRequest, match=f"'{word}' of 'it' is . tokens") as caught:
            MaskedClass.of(Template.of(template), {"it": [word]}, tokenizer)
        assert caught.value.param == "labels"


def test_the_mask_is_found_and_takes_the_space(tokenizer: Tokenizer) -> None:
    way = MaskedClass.of(Template.of("{text} It was [MASK]."), {"yes": ["good"]}, tokenizer)
    text = tokenizer.encode_pieces(way.template.pieces({"text": "<mask> "}))
    row = way.row(text)
    assert row.mask is not None
    assert text.ids.count(way.mask) == 1
    assert tokenizer.decode(text.ids[: row.mask], False) == "<mask>  It was"
    with pytest.raises(InvalidRequest, match="cut before its mask"):
        way.row(EncodedText(text.ids[: row.mask], None, []))


def test_scores_are_means_of_words_and_shares_of_labels(tokenizer: Tokenizer) -> None:
    labels = {"a": ["x", "y"], "b": ["z"]}
    way = MaskedClass.of(Template.of("{text}[MASK]"), labels, tokenizer)
    found = way.show(Encoded({}, EncodedText([], None, []), Vector(array("f", [1.0, 3.0, 2.0]).tobytes())))
    assert found == {"label": "a", "score": 0.5, "scores": {"a": 0.5, "b": 0.5}}


def test_no_mask_no_words(tmp_path: Path) -> None:
    plain = Tokenizer(write_backbone(tmp_path / "tiny"))
    with pytest.raises(UnsupportedTask, match="no mask"):
        MaskedClass.of(Template.of("{text} [MASK]"), {"yes": ["x"]}, plain)
