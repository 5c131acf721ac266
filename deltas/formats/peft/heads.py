"""Task heads: SEQ_CLS and TOKEN_CLS models save theirs as plain modules, ``classifier`` or ``score``."""

from __future__ import annotations

from deltas.errors import UnsupportedDelta
from deltas.formats.files import listed
from deltas.formats.peft.reading import PREFIX, SHARED, Reading
from deltas.formats.sources import Own, Source

_POOLER = "bert.pooler.dense"  # which PEFT does not save unless told to
_TASKS = {"SEQ_CLS": "classify", "TOKEN_CLS": "tag"}
_LLAMAS = ("gemma", "gemma2", "llama", "mistral", "qwen2", "qwen3")
# By family and task: the layers' modules, their activations, what is pooled.
HEADS: dict[tuple[str, str], tuple[tuple[str, ...], tuple[str, ...], str]] = {
    ("bert", "SEQ_CLS"): (("bert.pooler.dense", "classifier"), ("tanh", "identity"), "first"),
    ("roberta", "SEQ_CLS"): (("classifier.dense", "classifier.out_proj"), ("tanh", "identity"), "first"),
    ("bert", "TOKEN_CLS"): (("classifier",), ("identity",), "none"),
    ("roberta", "TOKEN_CLS"): (("classifier",), ("identity",), "none"),
    ("gpt2", "TOKEN_CLS"): (("classifier",), ("identity",), "none"),
    ("gpt_neox", "TOKEN_CLS"): (("classifier",), ("identity",), "none"),
    **{
        (family, "SEQ_CLS"): (("score",), ("identity",), "last")
        for family in (*_LLAMAS, "gemma3_text", "gpt2", "gpt_neox", "opt")
    },
    **{(family, "TOKEN_CLS"): (("score",), ("identity",), "none") for family in _LLAMAS},
}


def read_head(reading: Reading) -> None:
    """Claim the head that the task needs. Refuses a task without its head: PEFT would begin with a random one."""
    task = reading.config.get("task_type")
    if task not in _TASKS:
        return
    layers, activations, pooling = HEADS.get((reading.spec.family, str(task)), ((), (), ""))
    found: dict[str, Source] = {}
    missing: list[str] = []
    for index, path in enumerate(layers):
        prefix = (
            SHARED if f"{SHARED}{path}.weight" in reading.left else PREFIX
        )  # with a prompt nothing is wrapped
        weight, bias = (f"{prefix}{path}.{parameter}" for parameter in ("weight", "bias"))
        if weight not in reading.left and path == _POOLER:
            width = reading.spec.hidden
            found |= {
                f"layers.{index}/weight": Own(f"{path}.weight", (width, width)),
                f"layers.{index}/bias": Own(f"{path}.bias", (width,)),
            }
        elif weight not in reading.left:
            missing.append(weight)
        else:
            found[f"layers.{index}/weight"] = reading.claim(weight)
            if bias in reading.left:
                found[f"layers.{index}/bias"] = reading.claim(bias)
    if not layers or missing:
        needs = f"its head's tensors: {listed(missing)}" if layers else "a head that is not served"
        raise UnsupportedDelta(f"task_type {task} of {reading.spec.family} needs {needs}", field="task_type")
    kind = _TASKS[str(task)]
    last = reading.header.tensors[str(found[f"layers.{len(layers) - 1}/weight"])].shape
    if kind == "classify" and last[:1] == (1,):
        kind = "regress"
    config = {"kind": kind, "pooling": pooling, "activations": list(activations), "labels": None}
    reading.add("head", config, found)
