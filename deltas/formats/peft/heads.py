"""Task heads: SEQ_CLS and TOKEN_CLS models save theirs as plain modules, ``classifier`` or ``score``."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from deltas.errors import UnsupportedDelta
from deltas.formats.files import listed
from deltas.formats.peft.reading import PREFIX, SHARED, Reading
from deltas.formats.sources import Own, Source
from deltas.sites import BackboneSpec

# What PEFT does not save unless told to: then the backbone's own is used.
_BACKBONES = ("bert.pooler.dense", "head.dense", "head.norm")
_NORMS = ("head.norm",)
_TASKS = {"SEQ_CLS": "classify", "TOKEN_CLS": "tag"}
_LLAMAS = ("gemma", "gemma2", "llama", "mistral", "qwen2", "qwen3")


@dataclass(frozen=True, slots=True)
class OwnHead:
    """The head of a family's class for a task: the modules of its linears, what follows each of them (an activation, and
    a layer norm where a module is named), and which tokens it reads."""

    paths: tuple[str, ...]
    activations: tuple[str, ...]
    pooling: str
    norms: tuple[str, ...] = ()
    norm_eps: float | None = None


_TAGGER = OwnHead(("classifier",), ("identity",), "none")
_SCORE = OwnHead(("score",), ("identity",), "last")
_MODERN = OwnHead(
    ("head.dense", "classifier"),
    ("gelu", "identity"),
    "first",
    norms=("head.norm", ""),
)
_HEADS: dict[tuple[str, str], OwnHead] = {
    ("bert", "SEQ_CLS"): OwnHead(("bert.pooler.dense", "classifier"), ("tanh", "identity"), "first"),
    ("roberta", "SEQ_CLS"): OwnHead(
        ("classifier.dense", "classifier.out_proj"), ("tanh", "identity"), "first"
    ),
    ("distilbert", "SEQ_CLS"): OwnHead(("pre_classifier", "classifier"), ("relu", "identity"), "first"),
    ("modernbert", "SEQ_CLS"): _MODERN,
    ("modernbert", "TOKEN_CLS"): replace(_MODERN, pooling="none"),
    **{(family, "TOKEN_CLS"): _TAGGER for family in ("bert", "distilbert", "gpt2", "gpt_neox", "roberta")},
    **{(family, "SEQ_CLS"): _SCORE for family in (*_LLAMAS, "gemma3_text", "gpt2", "gpt_neox", "opt")},
    **{(family, "TOKEN_CLS"): OwnHead(("score",), ("identity",), "none") for family in _LLAMAS},
}


def own_head(spec: BackboneSpec, task: object) -> OwnHead | None:
    """The head of the backbone's class for one of PEFT's tasks, or None where there is none that is served."""
    head = _HEADS.get((spec.family, str(task)))
    if head is None or spec.task_head is None:
        return head
    pooling = head.pooling if head.pooling == "none" else spec.task_head.pooling
    activations = (spec.task_head.activation, *head.activations[1:])
    return replace(head, pooling=pooling, activations=activations, norm_eps=spec.task_head.norm_eps)


def head_modules(spec: BackboneSpec, task: object) -> frozenset[str]:
    """Paths of the modules of that head. ModernBERT's are called as the language model's head is, and are not that."""
    head = own_head(spec, task)
    return frozenset() if head is None else frozenset({*head.paths, *filter(None, head.norms)})


def read_head(reading: Reading) -> None:
    """Claim the head that the task needs. Refuses a task without its head: PEFT would begin with a random one."""
    task = reading.config.get("task_type")
    if task not in _TASKS:
        return
    head = own_head(reading.spec, task)
    if head is None:
        raise UnsupportedDelta(
            f"task_type {task} of {reading.spec.family} needs a head that is not served", field="task_type"
        )
    _refuse_tuned(reading, task)
    found: dict[str, Source] = {}
    missing: list[str] = []
    for index, path in enumerate(head.paths):
        for parameter in ("weight", "bias"):
            missing += _claim(reading, path, parameter, f"layers.{index}/{parameter}", found)
    for index, path in enumerate(head.norms):
        for parameter, name in (("weight", "norm"), ("bias", "norm_bias")) if path else ():
            missing += _claim(reading, path, parameter, f"layers.{index}/{name}", found)
    if missing:
        raise UnsupportedDelta(
            f"task_type {task} of {reading.spec.family} needs its head's tensors: {listed(missing)}",
            field="task_type",
        )
    kind = _TASKS[str(task)]
    last = reading.header.tensors[str(found[f"layers.{len(head.paths) - 1}/weight"])].shape
    if kind == "classify" and last[:1] == (1,):
        kind = "regress"
    config: dict[str, Any] = {
        "kind": kind,
        "pooling": head.pooling,
        "activations": list(head.activations),
        "labels": None,
    }
    if head.norms:
        config["norm_eps"] = head.norm_eps
    reading.add("head", config, found)


def _claim(reading: Reading, path: str, parameter: str, name: str, found: dict[str, Source]) -> list[str]:
    """Put a parameter of the head into ``found`` as ``name``; returns it where it is missing. A bias may be."""
    # with a prompt nothing is wrapped
    key = next(
        (k for k in (f"{SHARED}{path}.{parameter}", f"{PREFIX}{path}.{parameter}") if k in reading.left), None
    )
    site, width = reading.spec.by_path.get(path), reading.spec.hidden
    if key is not None:
        found[name] = reading.claim(key)
    elif path in _BACKBONES:
        if parameter == "weight" or site is None or site.bias:
            square = parameter == "weight" and path not in _NORMS
            found[name] = Own(f"{path}.{parameter}", (width, width) if square else (width,))
    elif parameter == "weight":
        return [f"{PREFIX}{path}.{parameter}"]
    return []


def _refuse_tuned(reading: Reading, task: object) -> None:
    """A LoRA on a module of the head is no change of our language model's head, which has a module of that name."""
    for path in sorted(head_modules(reading.spec, task)):
        site = reading.spec.by_path.get(path)
        if site is not None and site.name in reading.tuned:
            raise UnsupportedDelta(
                f"{path} is a module of the task's head, which PEFT changed in part; served are whole modules: put it "
                "into modules_to_save and, where target_modules is 'all-linear', into exclude_modules",
                field="target_modules",
            )
