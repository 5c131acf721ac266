"""Classification by a verbalizer at a mask: which label's words does a masked language model expect there?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from server.api import encoding
from server.api.ports import Tokenizer
from server.api.schemas_tasks import CutParameters
from server.api.tasks.encoded import Encoded, EncodedWay
from server.api.tasks.heads import ranked
from server.api.tasks.ways import Output
from server.engine.templates import Template
from server.errors import InvalidRequest, UnsupportedTask
from server.store.reference import shown
from server.types import EncodedText, EncoderInput, Want

MASK = "[MASK]"  # what templates may write for the tokenizer's own


@dataclass(frozen=True)
class MaskedClass(EncodedWay[CutParameters]):
    """``classify`` by the words at a mask.

    A label's score is the mean of its words' log-probabilities at the mask, and ``scores`` is the softmax over the
    labels' scores; with one word a label that is the softmax over those words' logits. ``words`` has each label's
    words as places in ``candidates``, which are token ids; ``mask`` is the mask's.
    """

    labels: Sequence[str]
    words: Sequence[Sequence[int]]
    candidates: Sequence[int]
    mask: int

    @classmethod
    def of(cls, template: Template, labels: Mapping[str, Sequence[str]], tokenizer: Tokenizer) -> MaskedClass:
        """Raises InvalidRequest for a template without exactly one mask, and for a word that is not one token."""
        if tokenizer.mask_token is None:
            raise UnsupportedTask("The backbone's tokenizer has no mask, at which words could be expected.")
        written, mask = tokenizer.mask_token
        template = template.with_literals(lambda text: text.replace(MASK, written))
        literals = [part.text for text in template.texts for part in text if not part.is_field]
        if (count := sum(text.count(written) for text in literals)) != 1:
            raise InvalidRequest(
                f"Invalid 'template': it has {count} masks ({MASK}); labels that are an object of words need one.",
                param="template",
            )
        behind_space = any(text.partition(written)[0][-1:].isspace() for text in literals if written in text)
        lead = " " if behind_space else ""
        candidates: dict[int, str] = {}  # a token, and the label that it stands for
        words: list[list[int]] = []
        for label, texts in labels.items():
            words.append([])
            for text in texts:
                token = _single_token(tokenizer, lead, text, label)
                if token in candidates:
                    raise InvalidRequest(
                        f"Invalid 'labels': the word {shown(text)} of {shown(label)} is the same token as a word of "
                        f"{shown(candidates[token])}.",
                        param="labels",
                    )
                words[-1].append(len(candidates))
                candidates[token] = label
        return cls(template, CutParameters, [*labels], words, [*candidates], mask)

    def want(self, parameters: CutParameters) -> Want:
        del parameters
        return Want("mask", candidates=[*self.candidates])

    def row(self, text: EncodedText) -> EncoderInput:
        if self.mask not in text.ids:
            raise InvalidRequest("The input was cut before its mask.", param="truncate_prompt_tokens")
        return EncoderInput(text.ids, text.types, text.ids.index(self.mask))

    def show(self, row: Encoded) -> Output:
        logits = encoding.floats(row.vector)
        # The vocabulary's normaliser is the same in every mean, so logits do in place of log-probabilities.
        means = [sum(logits[place] for place in places) / len(places) for places in self.words]
        return ranked(self.labels, encoding.softmax(means))


def _single_token(tokenizer: Tokenizer, lead: str, word: str, label: str) -> int:
    """The token that a word is at the mask, behind a space where the template has one there."""
    ids = tokenizer.encode(lead + word, False)
    if len(ids) != 1 or ids[0] == tokenizer.unknown_id:
        what = "not in the vocabulary" if len(ids) <= 1 else f"{len(ids)} tokens"
        raise InvalidRequest(
            f"Invalid 'labels': the word {shown(word)} of {shown(label)} is {what}; at a mask it must be one token.",
            param="labels",
        )
    return ids[0]
