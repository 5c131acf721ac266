"""What an engine says of its backbone once it is resident."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from server.engine.backbone import Backbone
from server.types import BackboneInfo


def info_of(
    backbone: Backbone,
    *,
    max_model_len: int,
    max_rows: int,
    eos_token_ids: Iterable[int] = (),
    decoder_start: Sequence[int] = (),
) -> BackboneInfo:
    """The backbone's own description, with what the engine around it allows."""
    return BackboneInfo(
        name=backbone.name,
        folder=str(backbone.folder),
        family=backbone.spec.family,
        revision=backbone.spec.revision,
        dtype=str(backbone.dtype)[6:],
        device=str(backbone.device),
        parameters=backbone.parameters,
        max_model_len=max_model_len,
        max_rows=max_rows,
        eos_token_ids=sorted(eos_token_ids),
        decoder_start=list(decoder_start),
    )
