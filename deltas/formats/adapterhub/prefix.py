"""AdapterHub's prefix tuning and prompt tuning. Neither shifts the positions of a row's own tokens.

Prefixes go before keys and values after the rotary embedding and the cache. One tensor holds all layers of a stack, as
it is (``flat``) or as what a perceptron makes it of. Every attention of the library's model has the whole store as a
submodule, so files repeat each tensor once per attention. A prompt is put after the embedding norm; in front of the
first token or after it is the same there, since positions are in the embeddings by then.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from deltas.errors import InvalidDelta, UnsupportedDelta
from deltas.formats.adapterhub import places
from deltas.formats.adapterhub.keys import Keys
from deltas.formats.adapterhub.options import (
    PREFIX_DEFAULTS,
    PREFIX_KEYS,
    PROMPT_DEFAULTS,
    PROMPT_KEYS,
    Config,
    activation,
    left_out,
    positive,
)
from deltas.formats.header import shown
from deltas.formats.plan import PlannedComponent, check_config
from deltas.formats.sources import Source
from deltas.methods import gates

_PERCEPTRON = {
    "tokens": "wte.weight",
    "down": "control_trans.0.weight",
    "down_bias": "control_trans.0.bias",
    "up": "control_trans.2.weight",
    "up_bias": "control_trans.2.bias",
}
_FLAT = {"flat": "control_trans"}


def component(config: Mapping[str, Any], keys: Keys, where: str) -> PlannedComponent:
    """One prefix configuration. Raises :class:`InvalidDelta` or :class:`UnsupportedDelta`."""
    check_config(config, PREFIX_KEYS, where)
    options = {**PREFIX_DEFAULTS, **config}
    stacks: dict[str, list[str]] = {}
    sources: dict[str, Source] = {}
    _check_left_out(options, keys)
    skipped = left_out(options)
    for kind, place in places.attentions(keys.spec):
        off = kind in ("encoder_prefix", "cross_prefix") and not options[kind]
        if off or place.layer in skipped:
            continue
        stacks.setdefault(kind, []).append(place.site)
        if options["use_gating"]:
            gates.check_gate(place.site, keys.spec, "use_gating")
            stem = f"{place.module}.prefix_tuning.prefix_gates.{keys.name}"
            outputs = 1 if options["shared_gating"] else 2
            if keys.shape(f"{stem}.weight")[:1] != (outputs,):
                raise InvalidDelta(
                    f"{shown(keys.key(f'{stem}.weight'))} has not {outputs} rows, as shared_gating says",
                    field="shared_gating",
                )
            sources[f"{place.site}/gate"] = keys.key(f"{stem}.weight")
            sources[f"{place.site}/gate_bias"] = keys.key(f"{stem}.bias")
    if not stacks:
        raise InvalidDelta("the config places no prefix in any layer", field="config")
    for kind in stacks:
        for ours, theirs in (_FLAT if options["flat"] else _PERCEPTRON).items():
            path = f"prefix_tunings.{keys.name}.{kind}.{theirs}"
            sources[f"{kind}/{ours}"] = keys.key(f"prefix_tuning.{path}")
            for _, place in places.attentions(keys.spec):
                keys.repeat(f"{place.module}.prefix_tuning.pool.{path}", f"prefix_tuning.{path}")
    canonical = {
        "stacks": stacks,
        "activation": "identity" if options["flat"] else activation(options["non_linearity"]),
        "length": positive(options, "prefix_length"),
        "shifts_keys": keys.spec.family == "t5",
    }
    return PlannedComponent("packed_prefix", canonical, sources)


def _check_left_out(config: Config, keys: Keys) -> None:
    """Some layers with and some without a prefix: not in one cache, nor with T5's shared position bias."""
    skipped = left_out(config)
    by_kind: dict[str, set[bool]] = {}
    for kind, place in places.attentions(keys.spec):
        by_kind.setdefault(kind, set()).add(place.layer in skipped)
    if keys.spec.kind != "encoder" and any(len(states) > 1 for states in by_kind.values()):
        reason = (
            "the library loses T5's position bias where layers have prefixes of different lengths"
            if keys.spec.family == "t5"
            else "on a causal backbone every layer has the prefix, or none"
        )
        raise UnsupportedDelta(f"leave_out is not served for prefixes here: {reason}", field="leave_out")


def prompt(config: Mapping[str, Any], keys: Keys, where: str) -> PlannedComponent:
    """One prompt configuration. Raises :class:`InvalidDelta` or :class:`UnsupportedDelta`."""
    check_config(config, PROMPT_KEYS, where)
    options = {**PROMPT_DEFAULTS, **config}
    if keys.spec.family not in ("bert", "roberta"):
        raise UnsupportedDelta(
            f"the library has no prompt tuning for {keys.spec.family}; it has for bert and roberta",
            field="architecture",
        )
    path = f"prompt_tuning.prompt_tunings.{keys.name}.prompt_embedding.weight"
    shape, wanted = keys.shape(path), positive(options, "prompt_length")
    if shape[:1] != (wanted,):
        raise InvalidDelta(
            f"{shown(keys.key(path))} has shape {list(shape)}, but prompt_length is {wanted}",
            field="prompt_length",
        )
    return PlannedComponent("prompt", {"after_norm": True}, {"embeddings": keys.key(path)})
