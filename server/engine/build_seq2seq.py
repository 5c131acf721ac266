"""Puts the engine of an encoder-decoder together: the decoders' step loop, with a source and a second KV for each row."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

from deltas.ops import Mode
from server.engine.backbone import Backbone
from server.engine.engine import Engine
from server.engine.info import info_of
from server.engine.kv import token_bytes
from server.engine.messages import Reply
from server.engine.process import EngineConfig
from server.engine.scheduler import Scheduler
from server.engine.seq2seq import VIRTUAL, Seq2SeqRunner
from server.engine.seq2seq_probe import Seq2SeqProbe
from server.engine.stacks import decoder_of, stacks_of
from server.engine.tokenizer import Tokenizer
from server.errors import InvalidRequest


def seq2seq_engine(
    config: EngineConfig, backbone: Backbone, kv_bytes: int, send: Callable[[Reply], None]
) -> Engine:
    """The engine around a loaded encoder-decoder; ``kv_bytes`` is what its keys and values may take.

    A source and an answer may each have ``--max-model-len`` tokens, without it the backbone's positions or, where it
    counts none, those that it was trained on. Raises :class:`InvalidRequest` for settings that cannot work.
    """
    spec, device = backbone.spec, backbone.device
    positions = stacks_of(backbone).positions
    if positions is not None and config.max_model_len is not None and config.max_model_len > positions:
        raise InvalidRequest(
            f"--max-model-len {config.max_model_len} is beyond the backbone's {positions} positions",
            param="max_model_len",
        )
    capacity = config.max_model_len or spec.max_positions
    kv_tokens = kv_bytes // token_bytes(decoder_of(spec), backbone.dtype)
    whole = 2 * capacity + VIRTUAL
    if kv_tokens < whole:
        raise InvalidRequest(
            f"{kv_bytes} bytes for keys and values hold {kv_tokens} tokens, fewer than one row of {whole} (a source and "
            "an answer): lower --max-model-len or raise --kv-bytes",
            param="kv_bytes",
        )
    # mapped memory is committed as it is written, so on a CPU slots may promise more than the budget
    fitting = config.max_rows if device.type == "cpu" else max(1, kv_tokens // whole - 1)
    rows = min(config.max_rows, fitting)
    runner = Seq2SeqRunner(backbone, rows, capacity, capacity, mode=cast("Mode | None", config.ops_mode))
    info = info_of(
        backbone,
        max_model_len=capacity,
        max_rows=rows,
        eos_token_ids=Tokenizer(backbone.folder).eos_token_ids,
        decoder_start=decoder_start(backbone),
    )
    return Engine(
        info=info,
        runner=runner,
        probe=Seq2SeqProbe(runner),
        scheduler=Scheduler(
            max_rows=rows,
            slot_tokens=capacity,
            source_tokens=capacity,
            kv_tokens=min(kv_tokens, 2 * rows * capacity),
            prefill_tokens=config.prefill_tokens,
            max_waiting=config.max_waiting,
            queue_timeout=config.queue_timeout,
        ),
        send=send,
        delta_bytes=config.delta_bytes,
        host_delta_bytes=config.host_delta_bytes,
        pinned_delta_share=config.pinned_delta_share,
    )


def decoder_start(backbone: Backbone) -> list[int]:
    """The tokens that answers begin after: the decoder's start, and the first token of every answer where the
    checkpoint forces one (BART's for summaries). Raises :class:`InvalidRequest` where it does not say the start.
    """
    start = _configured(backbone, "decoder_start_token_id")
    if start is None:
        raise InvalidRequest(
            f"{backbone.name} does not say what its answers begin after: set decoder_start_token_id in its config.json",
            param="backbone",
        )
    forced = _configured(backbone, "forced_bos_token_id")
    return [start] if forced is None else [start, forced]


def _configured(backbone: Backbone, name: str) -> int | None:
    """A token id of the generation's configuration, or else of the model's."""
    for config in (backbone.model.generation_config, backbone.model.config):
        found = getattr(config, name, None)
        if found is not None:
            return int(found)
    return None
