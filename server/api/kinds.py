"""What a backbone and a delta are for: generating, or encoding; asking for the other is a clear error."""

from __future__ import annotations

from deltas.sites import BackboneSpec
from server.api.models import Target
from server.api.services import Backbone
from server.errors import InvalidRequest, UnsupportedTask

CLASSIFIES = ("classify", "regress")


def generates(spec: BackboneSpec, name: str) -> None:
    """Raises :class:`UnsupportedTask` for a backbone that does not generate text."""
    if spec.kind == "encoder":
        raise UnsupportedTask(
            f"'{name}' is an encoder ({spec.family}) and does not generate text: use /v1/embeddings, or /classify "
            "with a delta that has a task head."
        )


def echoes(backbone: Backbone, echo: bool | None) -> None:
    """Raises :class:`InvalidRequest` where an answer does not go on with its prompt, so that there is nothing to echo."""
    if echo and backbone.spec.kind == "encoder-decoder":
        raise InvalidRequest(
            f"'{backbone.info.name}' ({backbone.spec.family}) reads the prompt with its encoder and does not go on with "
            "it: leave out 'echo'.",
            param="echo",
        )


def encodes(backbone: Backbone) -> None:
    """Raises :class:`UnsupportedTask` for a backbone that is no encoder."""
    if backbone.spec.kind != "encoder":
        raise UnsupportedTask(
            f"'{backbone.info.name}' generates text ({backbone.spec.family}) and is no encoder: use /v1/completions "
            "or /v1/chat/completions."
        )


def without_head(target: Target) -> None:
    """Raises :class:`UnsupportedTask` for a delta whose task head a generated text would leave unused."""
    for record in target.records:
        if record.task_kind is not None:
            raise UnsupportedTask(
                f"The delta '{record.name}' brings a task head ({record.task_kind}) and does not generate text."
            )


def head_of(target: Target, served: tuple[str, ...] = CLASSIFIES) -> tuple[str, list[str] | None]:
    """The kind, one of ``served``, and the labels of the one head. Raises :class:`UnsupportedTask` where there is none."""
    heads = [record for record in target.records if record.task_kind is not None]
    if not heads:
        raise UnsupportedTask(
            f"'{target.model}' has no task head; a delta brings one (PEFT's SEQ_CLS, AdapterHub's "
            "heads, the native method 'head')."
        )
    if len(heads) > 1:
        names = ", ".join(record.name for record in heads)
        raise UnsupportedTask(f"The deltas {names} bring a task head each; a sum can have one.")
    (record,) = heads
    if record.task_kind not in served:
        gives = "an output for every token" if record.task_kind == "tag" else "outputs for a whole input"
        raise UnsupportedTask(
            f"The head of '{record.name}' is for '{record.task_kind}', which gives {gives}; "
            f"here: {', '.join(served)}."
        )
    return str(record.task_kind), record.labels
