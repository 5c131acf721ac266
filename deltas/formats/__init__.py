"""Formats: the files of the libraries that make deltas, read strictly. One file per library."""

from __future__ import annotations

from collections.abc import Callable

from deltas.delta import Delta
from deltas.errors import InvalidDelta, UnsupportedDelta
from deltas.formats import adapterhub, native, opendelta, peft
from deltas.formats.files import DeltaFiles, listed
from deltas.formats.frozen import Frozen
from deltas.formats.plan import Plan, execute
from deltas.sites import BackboneSpec

_CONFIG = "adapter_config.json"

_EXPECTED = (
    "expected one of: PEFT (adapter_config.json, adapter_model.safetensors), "
    "AdapterHub (adapter_config.json, adapter.safetensors), OpenDelta (config.json, pytorch_model.bin), "
    "native (delta.safetensors)"
)

# What the libraries and their trainers leave beside a delta. Never opened.
_BESIDE = frozenset(
    {
        "README.md",
        "LICENSE",
        "LICENSE.txt",
        "LICENSE.md",
        ".gitattributes",
        ".gitignore",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "vocab.json",
        "vocab.txt",
        "merges.txt",
        "spiece.model",
        "chat_template.jinja",
        "chat_template.json",
        "generation_config.json",
        "config.yml",
        "training_args.bin",
        "trainer_state.json",
        "trainer_log.jsonl",
        "all_results.json",
        "train_results.json",
        "eval_results.json",
    }
)

# AdapterHub's, which mean nothing beside another library's files or without the whole composition.
_HEADS = adapterhub.HEAD_FILES
_COMPOSED = adapterhub.FUSION_FILES | {adapterhub.SETUP, "adapter_interface.json"}

_Planner = Callable[[DeltaFiles, BackboneSpec], Plan]


def read(files: DeltaFiles, spec: BackboneSpec, frozen: Frozen | None = None) -> Delta:
    """The delta in these files, in canonical form, checked against the backbone; tensors keep their dtype.

    ``frozen`` gives the backbone's own tensors: AdapterHub saves a copy of the language model's head beside an
    adapter, which is fine as long as it is the backbone's. Without it, such files are refused.
    Configs and headers are checked first; tensors are loaded only when every one of them will be used.
    Raises :class:`InvalidDelta` or :class:`UnsupportedDelta`, ``field`` naming the file, key or tensor.
    """
    planner, own = _detect(files)
    _refuse_others(files, own)
    if planner is adapterhub.plan:
        adapterhub.check_copies(files, frozen)
    delta = execute(planner(files, spec), files, spec, frozen)
    if planner is native.plan:
        stated = native.manifest(files.header(native.WEIGHTS)).get("digest")
        if stated is not None:
            native.verify(delta, stated)
    return delta


def _detect(files: DeltaFiles) -> tuple[_Planner, set[str]]:
    """The reader for these files, and the names it reads."""
    found: list[tuple[_Planner, set[str]]] = []
    if native.WEIGHTS in files:
        found.append((native.plan, {native.WEIGHTS}))
    if _CONFIG in files:
        config = files.json(_CONFIG)
        if "peft_type" in config:
            found.append((peft.plan, {_CONFIG, peft.WEIGHTS, peft.PICKLED}))
        if "config" in config and ({"model_type", "hidden_size", "name"} & set(config)):
            found.append((adapterhub.plan, adapterhub.own_names(files)))
    elif adapterhub.SETUP in files:
        found.append((adapterhub.plan, adapterhub.own_names(files)))
    if opendelta.CONFIG in files and "delta_type" in files.json(opendelta.CONFIG):
        found.append((opendelta.plan, {opendelta.CONFIG, opendelta.WEIGHTS, opendelta.PICKLED}))
    if len(found) != 1:
        problem = "these files are several deltas at once" if found else "these files are not a known delta"
        raise InvalidDelta(f"{problem}: {listed(files.names)}; {_EXPECTED}", field="file")
    return found[0]


def _refuse_others(files: DeltaFiles, own: set[str]) -> None:
    for name in files.names:
        if name in own or name in _BESIDE:
            continue
        if name in _HEADS:
            raise UnsupportedDelta(f"{name}: heads in a file of their own are AdapterHub's", field=name)
        if name in _COMPOSED:
            raise UnsupportedDelta(
                f"{name}: a composition of adapters is served as save_adapter_setup writes it, an archive with "
                "adapter_setup.json and a folder for each part",
                field=name,
            )
        raise InvalidDelta(f"{listed([name])} is not part of a delta; {_EXPECTED}", field="file")


__all__ = ["DeltaFiles", "Frozen", "read"]
