"""Heads beside AdapterHub's adapters: trained ones, and copies of the backbone's own language-model head.

``save_adapter`` writes the head of the model that it is called on. Of a language model that is the backbone's own, a
copy that must be one. ``AutoAdapterModel`` has trained heads with a configuration, Hugging Face's classes for tasks have
one of a known form. A head is read here where its mathematics is a list of layers on the first token's, the last
token's or every token's hidden state.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from deltas.errors import InvalidDelta, UnsupportedDelta
from deltas.formats.adapterhub.names import HEAD, HEAD_CONFIG, HEAD_FILES, PICKLED_HEAD, one_of_two
from deltas.formats.adapterhub.options import activation
from deltas.formats.files import DeltaFiles
from deltas.formats.frozen import Frozen, same
from deltas.formats.header import Header, shown
from deltas.formats.plan import Check, PlannedComponent, check_config, one_of
from deltas.formats.sources import Source
from deltas.methods.head import MAX_LAYERS
from deltas.sites import BackboneSpec

_ADVICE = "leave out the head's files (save_adapter(..., with_head=False)) unless you trained it"
_LANGUAGE_MODEL = ("lm_head.", "cls.predictions.", "vocab_", "final_logits_bias")


def _no_pooler(key: str, value: object) -> None:
    if value is not False:
        raise UnsupportedDelta(
            f"{HEAD_CONFIG}: a head with {key} reads the backbone's pooler, which a language model has not",
            field=key,
        )


_KEYS: Mapping[str, Check | None] = {
    "head_type": None,
    "num_labels": None,
    "layers": None,
    "activation_function": None,
    "use_pooler": _no_pooler,
    "label2id": None,
    "id2label": None,
    "bias": one_of(True, False),
    "dropout_prob": None,
}
_KINDS = {
    "classification": "classify",
    "multilabel_classification": "classify",
    "tagging": "tag",
}
# The heads of Hugging Face's own classes: kind, pooling, and each layer's module with its activation.
_STATIC = {
    "RobertaForSequenceClassification": (
        "classify",
        "first",
        {"classifier.dense": "tanh", "classifier.out_proj": "identity"},
    ),
    "DistilBertForSequenceClassification": (
        "classify",
        "first",
        {"pre_classifier": "relu", "classifier": "identity"},
    ),
    "BertForTokenClassification": ("tag", "none", {"classifier": "identity"}),
    "DistilBertForTokenClassification": ("tag", "none", {"classifier": "identity"}),
    "RobertaForTokenClassification": ("tag", "none", {"classifier": "identity"}),
    "GPT2ForTokenClassification": ("tag", "none", {"classifier": "identity"}),
    "GPT2ForSequenceClassification": ("classify", "last", {"score": "identity"}),
    "LlamaForSequenceClassification": ("classify", "last", {"score": "identity"}),
    "LlamaForTokenClassification": ("tag", "none", {"score": "identity"}),
}
_WITHOUT_BIAS = frozenset({"GPT2ForSequenceClassification", "LlamaForSequenceClassification"})


def check_copies(files: DeltaFiles, frozen: Frozen | None) -> None:
    """Refuse a language-model head that is not the backbone's own: :class:`UnsupportedDelta` names the file."""
    for folder in _folders(files):
        config, weights = folder + HEAD_CONFIG, one_of_two(files, folder, HEAD, PICKLED_HEAD)
        if weights not in files or config not in files:
            present = next(
                folder + name for name in (HEAD_CONFIG, HEAD, PICKLED_HEAD) if folder + name in files
            )
            raise UnsupportedDelta(
                f"{present}: a head has {HEAD_CONFIG} and a file with its tensors; {_ADVICE}", field=present
            )
        keys = files.header(weights).tensors
        if not is_copy(files, folder):
            continue
        for key in keys:
            if not key.startswith(_LANGUAGE_MODEL):
                raise UnsupportedDelta(
                    f"{weights}: only the backbone's own language-model head may be here; {_ADVICE}",
                    field=weights,
                )
            own = None if frozen is None else frozen(key)
            if own is None or not same(files.tensors(weights, [key])[key], own):
                raise UnsupportedDelta(
                    f"{weights}: {shown(key)} differs from the backbone's, and trained language-model heads are not "
                    f"served; {_ADVICE}",
                    field=weights,
                )


def is_copy(files: DeltaFiles, folder: str = "") -> bool:
    """Is this a language model's head, hence a copy of the backbone's own?"""
    weights = one_of_two(files, folder, HEAD, PICKLED_HEAD)
    return any(key.startswith(_LANGUAGE_MODEL) for key in files.header(weights).tensors)


def component(files: DeltaFiles, spec: BackboneSpec) -> tuple[PlannedComponent, str] | None:
    """The trained head and its file, or None where there is none.

    Raises :class:`InvalidDelta` or :class:`UnsupportedDelta`, naming the key or the file.
    """
    if not any(name in files for name in HEAD_FILES) or is_copy(files):
        return None
    weights, outer = one_of_two(files, "", HEAD, PICKLED_HEAD), files.json(HEAD_CONFIG)
    config = outer.get("config")
    if config is None:
        return _static(outer, files.header(weights)), weights
    if not isinstance(config, dict):
        raise InvalidDelta(f"{HEAD_CONFIG}: config must be an object", field="config")
    return _flexible(config, outer.get("name"), files, weights, spec), weights


def _folders(files: DeltaFiles) -> Iterator[str]:
    """Where heads are: at the top, or in the folders of a composition's parts."""
    seen = {name.rpartition("/") for name in files if name.rpartition("/")[2] in HEAD_FILES}
    yield from sorted({folder + slash for folder, slash, _ in seen})


def _static(outer: Mapping[str, Any], header: Header) -> PlannedComponent:
    known = _STATIC.get(str(outer.get("model_class")))
    if known is None:
        raise UnsupportedDelta(
            f"{HEAD_CONFIG}: the head of {shown(outer.get('model_class'))} is not served; {_ADVICE}",
            field=HEAD_CONFIG,
        )
    kind, pooling, modules = known
    sources: dict[str, Source] = {}
    for j, module in enumerate(modules):
        for parameter in ("weight",) if outer["model_class"] in _WITHOUT_BIAS else ("weight", "bias"):
            key = f"{module}.{parameter}"
            if key not in header.tensors:
                raise InvalidDelta(f"the head's file lacks {shown(key)}", field=key)
            sources[f"layers.{j}/{parameter}"] = key
    config = {
        "kind": "regress" if kind == "classify" and outer.get("num_labels") == 1 else kind,
        "pooling": pooling,
        "activations": list(modules.values()),
        "labels": _labels(outer.get("label2id")),
    }
    return PlannedComponent("head", config, sources)


def _flexible(
    config: Mapping[str, Any], name: object, files: DeltaFiles, weights: str, spec: BackboneSpec
) -> PlannedComponent:
    head_type = config.get("head_type")
    if not isinstance(head_type, str) or head_type not in _KINDS:
        raise UnsupportedDelta(
            f"{HEAD_CONFIG}: head_type {shown(head_type)} is not served; served: {', '.join(_KINDS)}",
            field="head_type",
        )
    check_config(config, _KEYS, f"{HEAD_CONFIG}: config")
    if spec.kind == "encoder-decoder":
        raise UnsupportedDelta(
            f"{HEAD_CONFIG}: the library's heads of encoder-decoders read the end token of the input at the decoder, "
            "which is not served",
            field="head_type",
        )
    kind = _KINDS[head_type]
    layers, between = config.get("layers"), config.get("activation_function")
    if type(layers) is not int or not 1 <= layers <= MAX_LAYERS:
        raise InvalidDelta(f"{HEAD_CONFIG}: layers must be 1 to {MAX_LAYERS}", field="layers")
    sources: dict[str, Source] = {}
    activations: list[str] = []
    at = 1  # each layer is a dropout, a linear and, but for the last, the activation
    for j in range(layers):
        last = j == layers - 1
        stem = f"heads.{name}.{at}"
        sources[f"layers.{j}/weight"] = f"{stem}.weight"
        if not last or config.get("bias", True):
            sources[f"layers.{j}/bias"] = f"{stem}.bias"
        activations.append("identity" if last or not between else activation(between, "activation_function"))
        at += 3 if between else 2
    tensors = files.header(weights).tensors
    missing = [key for key in map(str, sources.values()) if key not in tensors]
    if missing:
        raise InvalidDelta(f"{weights}: missing tensors: {shown(missing[0])}", field=missing[0])
    pooling = "none" if kind == "tag" else "first" if spec.kind == "encoder" else "last"
    if kind == "classify" and head_type == "classification" and config.get("num_labels") == 1:
        kind = "regress"
    canonical = {
        "kind": kind,
        "pooling": pooling,
        "activations": activations,
        "labels": _labels(config.get("label2id")),
    }
    return PlannedComponent("head", canonical, sources)


def _labels(ids: object) -> list[str] | None:
    """The labels in the order of the outputs, where the library stored some."""
    if ids is None:
        return None
    if not isinstance(ids, dict) or sorted(map(str, ids.values())) != sorted(map(str, range(len(ids)))):
        raise InvalidDelta(f"{HEAD_CONFIG}: label2id must number the labels from 0", field="label2id")
    return [label for label, _ in sorted(ids.items(), key=lambda item: int(item[1]))]
