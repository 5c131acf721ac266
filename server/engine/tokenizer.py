"""Text to token ids and back: the backbone's own tokenizer and chat template, loaded from a local folder.

All of it may be used from the event loop and from worker threads at once: plain encoding and decoding never
change anything, and chat templates work under a lock, on a tokenizer of their own.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from jinja2.exceptions import TemplateError
from tokenizers import Tokenizer as RustTokenizer
from transformers import AutoTokenizer

from server.engine.detokenizer import Detokenizer, Pieces, detokenizer
from server.engine.pieces import PieceEncoder
from server.errors import DeltaserveError, InvalidRequest
from server.types import EncodedText, TextPiece


class Tokenizer:
    """The tokenizer in ``folder`` (Hugging Face's layout). Nothing is downloaded, no code in it is run.

    Raises DeltaserveError (``unsupported_tokenizer``) if the fast tokenizers library cannot run it.
    """

    def __init__(self, folder: Path | str) -> None:
        folder = Path(folder)
        if not folder.is_dir():
            raise DeltaserveError(f"there is no folder {folder}", code="unsupported_tokenizer")
        try:
            self._chat = AutoTokenizer.from_pretrained(
                str(folder), local_files_only=True, trust_remote_code=False
            )
            # transformers switches settings of its tokenizer from text to text, so it keeps its own.
            self._fast = RustTokenizer.from_str(self._chat.backend_tokenizer.to_str())
        except (OSError, ValueError, AttributeError, ImportError) as error:
            message = f"no usable tokenizer in {folder} (a tokenizer.json is needed): {error}"
            raise DeltaserveError(message, code="unsupported_tokenizer") from error
        self._fast.no_truncation()
        self._fast.no_padding()
        self._chat_lock = threading.Lock()
        self._pieces = Pieces(self._fast)
        self._texts = PieceEncoder(
            self._fast,
            types="token_type_ids" in self._chat.model_input_names,
            unknown=self._chat.unk_token_id,
        )
        self.eos_token_ids = sorted(_eos_token_ids(folder, self._chat.eos_token_id))

    @property
    def vocab_size(self) -> int:
        """One more than the largest id of a token. The backbone's own vocabulary may be padded beyond."""
        return self._pieces.size

    @property
    def has_chat_template(self) -> bool:
        return bool(self._chat.chat_template)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of ``text``; a control token that it spells out is one. Releases the GIL.

        Raises InvalidRequest for a text with half a surrogate pair, which JSON can spell.
        """
        try:
            (encoding,) = self._fast.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        except (TypeError, UnicodeEncodeError) as error:
            raise InvalidRequest("the text is not valid Unicode") from error
        ids: list[int] = encoding.ids
        return ids

    def encode_within(self, text: str, limit: int) -> list[int]:
        """As :meth:`encode`, but with at most ``limit`` tokens: the text's last ones go, the control tokens around it stay.

        Raises InvalidRequest as :meth:`encode` does, and where the control tokens alone are more.
        """
        ids = self.encode(text)
        around = self._fast.num_special_tokens_to_add(is_pair=False)
        if len(ids) <= limit:
            return ids
        if limit <= around:
            raise InvalidRequest(
                f"a text of at most {limit} tokens has no room beside {around} control tokens",
                param="truncate_prompt_tokens",
            )
        (encoding,) = self._fast.encode_batch_fast([text], add_special_tokens=False)
        encoding.truncate(limit - around)
        cut: list[int] = self._fast.post_process(encoding).ids
        return cut

    @property
    def end_token(self) -> int | None:
        """What ends a text that is learnt: the tokenizer's own end of a sequence, else the first that generation knows."""
        if self._chat.eos_token_id is not None:
            return int(self._chat.eos_token_id)
        return self.eos_token_ids[0] if self.eos_token_ids else None

    @property
    def mask_token(self) -> tuple[str, int] | None:
        """The mask of a masked language model, as it is written, and its id; None where there is none."""
        if self._chat.mask_token is None:
            return None
        return str(self._chat.mask_token), int(self._chat.mask_token_id)

    @property
    def unknown_id(self) -> int | None:
        """What stands for text that the tokenizer does not know; None where it knows every text."""
        return None if self._chat.unk_token_id is None else int(self._chat.unk_token_id)

    def encode_pieces(
        self, texts: Sequence[Sequence[TextPiece]], limit: int | None = None, add_special_tokens: bool = True
    ) -> EncodedText:
        """One text, or two as a pair, in which only their writer's own pieces spell control tokens. Releases the GIL.

        Raises InvalidRequest as :meth:`server.engine.pieces.PieceEncoder.encode` does.
        """
        return self._texts.encode(texts, limit, around=add_special_tokens)

    def decode(self, token_ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """Text of ``token_ids``, U+FFFD where their bytes are not UTF-8. Ids of no token are left out."""
        pieces = self.detokenizer(skip_special_tokens)
        return pieces.push(token_ids) + pieces.flush()

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
    ) -> list[int]:
        """Token ids of a chat, through the backbone's own template.

        A control token that a message spells out is ordinary text: only the template opens and closes turns.
        Raises InvalidRequest if there is no template or it does not take these messages.
        """
        if not self.has_chat_template:
            raise InvalidRequest(
                "this backbone has no chat template: use /v1/completions, or serve a backbone whose folder "
                "has a chat_template.jinja",
                param="messages",
                code="no_chat_template",
            )
        try:
            with self._chat_lock:
                ids = self._chat.apply_chat_template(
                    [dict(message) for message in messages],
                    tools=None if tools is None else [dict(tool) for tool in tools],
                    add_generation_prompt=add_generation_prompt,
                    sanitize_control_tokens=True,
                    tokenize=True,
                    return_dict=False,
                )
        except (TemplateError, TypeError, ValueError, LookupError, AttributeError, RecursionError) as error:
            message = f"the backbone's chat template does not take these messages: {error}"
            raise InvalidRequest(message, param="messages") from error
        return cast("list[int]", ids)

    def detokenizer(self, skip_special_tokens: bool = True, context: Iterable[int] = ()) -> Detokenizer:
        """Makes text of one row's tokens as they come.

        ``context`` is what they follow, if they go on with its text (a prompt to complete): SentencePiece
        drops a space at the beginning of a text, not in the middle.
        """
        return detokenizer(self._pieces, skip_special_tokens, context)

    def token_text(self, token_id: int) -> str:
        """One token by itself, U+FFFD for parts of characters; special tokens as they are written."""
        return self.token_bytes(token_id).decode("utf-8", errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token stands for; empty for an id that no token has."""
        return self._pieces.bytes_of(token_id)


def _eos_token_ids(folder: Path, own: int | None) -> set[int]:
    """The end of a sequence by the tokenizer, and by generation_config.json or else config.json."""
    ids = set() if own is None else {own}
    for name in ("generation_config.json", "config.json"):
        path = folder / name
        found = json.loads(path.read_text()).get("eos_token_id") if path.exists() else None
        if found is not None:
            return ids | ({found} if isinstance(found, int) else set(found))
    return ids
