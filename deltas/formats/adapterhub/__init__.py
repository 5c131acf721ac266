"""AdapterHub's files: those of one adapter, with or without a head, or a composition in folders.

    adapter_config.json, adapter.safetensors (or pytorch_adapter.bin)
    head_config.json, model_head.safetensors (or pytorch_model_head.bin)
    adapter_setup.json, <adapter>/..., <adapter>,<adapter>/adapter_fusion_config.json, ...

Read from the code of ``adapters`` 1.3.0, and compared with what it computes: ``tests/oracle/test_adapterhub_table.py``.
"""

from __future__ import annotations

from deltas.formats.adapterhub import heads, setup, single
from deltas.formats.adapterhub.heads import check_copies
from deltas.formats.adapterhub.names import (
    ADAPTER_FILES,
    CONFIG,
    FUSION_FILES,
    HEAD,
    HEAD_CONFIG,
    HEAD_FILES,
    PICKLED,
    PICKLED_HEAD,
    SETUP,
    WEIGHTS,
)
from deltas.formats.files import DeltaFiles
from deltas.formats.plan import Plan, provenance
from deltas.sites import BackboneSpec


def plan(files: DeltaFiles, spec: BackboneSpec) -> Plan:
    """What to load. Raises :class:`InvalidDelta` or :class:`UnsupportedDelta`, naming the file, key or tensor."""
    if SETUP in files:
        return setup.plan(files, spec)
    outer, inner, keys = single.opened(files, spec)
    found = list(single.components(inner, keys, f"{CONFIG}: config"))
    weights = [keys.file]
    head = heads.component(files, spec)
    if head is not None:
        found.append(head[0])
        weights.append(head[1])
    return Plan(
        "adapterhub",
        files.join(weights),
        tuple(found),
        provenance(outer, ("model_name", "name", "version")),
        repeats=keys.repeats,
    )


def own_names(files: DeltaFiles) -> set[str]:
    """The names of files that may be AdapterHub's here."""
    return setup.names(files) if SETUP in files else {*ADAPTER_FILES, *HEAD_FILES}


__all__ = [
    "CONFIG",
    "FUSION_FILES",
    "HEAD",
    "HEAD_CONFIG",
    "HEAD_FILES",
    "PICKLED",
    "PICKLED_HEAD",
    "SETUP",
    "WEIGHTS",
    "check_copies",
    "own_names",
    "plan",
]
