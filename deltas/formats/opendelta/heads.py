"""Task heads in OpenDelta's files: parameters of a model class's own head, beside the delta's.

Which layers a head has follows from the class that the config names as ``backbone_class``, in transformers' own code.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from deltas.errors import InvalidDelta
from deltas.formats.files import listed
from deltas.formats.header import Header
from deltas.formats.plan import PlannedComponent

_CLASSIFIES, _TAGS = "ForSequenceClassification", "ForTokenClassification"


@dataclass(frozen=True, slots=True)
class _Layers:
    """Module paths of a head's linears, what follows each, and which tokens they read."""

    paths: tuple[str, ...]
    activations: tuple[str, ...]
    pooling: str
    kind: str
    bias: bool = True


_TAGGER = _Layers(("classifier",), ("identity",), "none", "tag")
_SCORE = _Layers(("score",), ("identity",), "last", "classify", bias=False)
_HEADS: Mapping[tuple[str, str], _Layers] = {
    ("bert", _CLASSIFIES): _Layers(
        ("bert.pooler.dense", "classifier"), ("tanh", "identity"), "first", "classify"
    ),
    ("roberta", _CLASSIFIES): _Layers(
        ("classifier.dense", "classifier.out_proj"), ("tanh", "identity"), "first", "classify"
    ),
    ("distilbert", _CLASSIFIES): _Layers(
        ("pre_classifier", "classifier"), ("relu", "identity"), "first", "classify"
    ),
    ("distilbert", _TAGS): _TAGGER,
    ("gpt2", _CLASSIFIES): _SCORE,
    ("llama", _CLASSIFIES): _SCORE,
    ("bert", _TAGS): _TAGGER,
    ("roberta", _TAGS): _TAGGER,
    ("gpt2", _TAGS): _TAGGER,
}


def component(
    config: Mapping[str, Any], family: str, names: Collection[str], header: Header
) -> PlannedComponent | None:
    """The head among ``names``, if there is one. Raises :class:`InvalidDelta` for a part of one, naming the tensor."""
    owner = config.get("backbone_class")
    suffix = next((end for end in (_CLASSIFIES, _TAGS) if isinstance(owner, str) and owner.endswith(end)), "")
    layers = _HEADS.get((family, suffix))
    if layers is None:
        return None
    sources = {
        f"layers.{j}/{parameter}": f"{path}.{parameter}"
        for j, path in enumerate(layers.paths)
        for parameter in ("weight", "bias")
        if layers.bias or parameter == "weight"
    }
    missing = [key for key in sources.values() if key not in names]
    if len(missing) == len(sources):
        return None
    if missing:
        raise InvalidDelta(
            f"a head of {listed([str(owner)])} is not complete without {listed(missing)}; it must have been trained "
            "as a whole",
            field=missing[0],
        )
    shape = header.tensors[f"{layers.paths[-1]}.weight"].shape
    one = layers.kind == "classify" and shape[:1] == (1,)  # as transformers takes one label
    description = {
        "kind": "regress" if one else layers.kind,
        "pooling": layers.pooling,
        "activations": list(layers.activations),
        "labels": None,
    }
    return PlannedComponent("head", description, sources)
