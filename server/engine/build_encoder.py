"""Puts the engine of an encoder together: no keys and values are kept, rows are batched by their tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

from deltas.ops import Mode
from server.engine.backbone import Backbone
from server.engine.batching import Batcher
from server.engine.encoder import EncoderRunner
from server.engine.encoder_engine import EncoderEngine
from server.engine.info import info_of
from server.engine.messages import Reply
from server.engine.pooling import read_embedder
from server.engine.process import EngineConfig
from server.engine.tokenizer import Tokenizer


def encoder_engine(config: EngineConfig, backbone: Backbone, send: Callable[[Reply], None]) -> EncoderEngine:
    """The engine around a loaded encoder.

    An input's limit is ``--max-model-len``, else what sentence-transformers made the backbone for, else its positions.
    Raises :class:`server.errors.InvalidRequest` for pooling that is not served.
    """
    embedder = read_embedder(backbone.folder)
    positions = backbone.spec.max_positions
    Tokenizer(backbone.folder)  # one that cannot be used is an error now, not at the first request
    info = info_of(
        backbone,
        max_model_len=config.max_model_len or min(positions, embedder.longest or positions),
        max_rows=config.max_rows,
    )
    return EncoderEngine(
        info=info,
        runner=EncoderRunner(backbone, mode=cast("Mode | None", config.ops_mode)),
        batcher=Batcher(
            max_rows=config.max_rows,
            step_tokens=config.prefill_tokens,
            max_waiting=config.max_waiting,
            queue_timeout=config.queue_timeout,
        ),
        embedder=embedder,
        send=send,
        delta_bytes=config.delta_bytes,
        host_delta_bytes=config.host_delta_bytes,
        pinned_delta_share=config.pinned_delta_share,
    )
