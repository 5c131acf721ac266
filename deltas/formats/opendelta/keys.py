"""The tensors of an OpenDelta file by what they are: a part of a delta module, or a parameter of the backbone."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from deltas.errors import InvalidDelta
from deltas.formats.files import listed
from deltas.formats.opendelta.modules import Module
from deltas.formats.plan import refuse_unknown
from deltas.sites import BackboneSpec, Site

_LINEAR = r"(?:weight|bias)"
_BOTTLENECK = rf"modulelist\.(?:down_proj|up_proj)\.{_LINEAR}"
_SAMPLERS = r"(?:down|up)_sampler\.(?:W|W_left|W_right|b|phm_rule|phm_rule_left|phm_rule_right)"
# Delta type -> what follows a module's path in a key: OpenDelta's name for what it puts there, and a tensor of it.
_TENSORS = {
    "lora": r"lora\.lora_[AB]",
    "adapter": rf"adapter\.{_BOTTLENECK}",
    "parallel_adapter": rf"parallel_adapter\.{_BOTTLENECK}",
    "compacter": rf"compactor\.{_SAMPLERS}",
    "low_rank_adapter": r"low_rank_adapter\.(?:down|up)_sampler\.(?:W_left|W_right|b)",
    "bitfit": r"bitfit\.bias",
    "soft_prompt": r"soft_prompt_layer\.soft_embeds",
    "prefix": rf"(?:prefix\.past_(?:key|value)|reparams\.(?:wte\.weight|control_trans\.[02]\.{_LINEAR}))",
}
_ANY = re.compile(rf"(?:.+\.)?(?:{'|'.join(_TENSORS.values())})")


@dataclass(frozen=True)
class Keys:
    """A file's keys.

    ``parts``: module path -> tensor of the delta's module there (``lora.lora_A``) -> key. ``own``: keys of the
    backbone's own parameters -> the site and the parameter (``weight``, ``bias``) that they replace.
    """

    parts: Mapping[str, Mapping[str, str]]
    own: Mapping[str, tuple[Site, str]]


def sort(kind: str, names: Iterable[str], known: Mapping[str, Module], spec: BackboneSpec, file: str) -> Keys:
    """Raises :class:`InvalidDelta`, naming the tensor, for those of another delta type, which OpenDelta would drop
    when it loads, and for those that mean nothing."""
    pattern = re.compile(rf"(?:(?P<path>.+)\.)?(?P<tensor>{_TENSORS[kind]})")
    parts: dict[str, dict[str, str]] = {}
    own: dict[str, tuple[Site, str]] = {}
    unknown: list[str] = []
    for name in names:
        match = pattern.fullmatch(name)
        if match is not None:
            path = _full(match["path"] or "", known, spec)
            parts.setdefault(path, {})[match["tensor"]] = name
        elif _ANY.fullmatch(name):
            raise InvalidDelta(
                f"{file}: {listed([name])} is no tensor of a {kind}; OpenDelta itself would drop it",
                field=name,
            )
        elif (found := _own(name, spec)) is not None:
            own[name] = found
        else:
            unknown.append(name)
    refuse_unknown(unknown, file)
    return Keys(parts, own)


# The heads of these own the bias of their last linear.
_HEAD_BIAS = {"cls.predictions": "cls.predictions.decoder", "lm_head": "lm_head.decoder"}


def _own(key: str, spec: BackboneSpec) -> tuple[Site, str] | None:
    path, _, parameter = key.rpartition(".")
    if parameter not in ("weight", "bias"):
        return None
    site = spec.site_at(path)
    if site is None and parameter == "bias":
        site = spec.site_at(_HEAD_BIAS.get(path, path))
    if site is None or (parameter == "bias" and not site.bias):
        return None
    return site, parameter


def _full(path: str, known: Mapping[str, Module], spec: BackboneSpec) -> str:
    """The module's path in the model with a head: files saved from the base model lack its name in front."""
    inside = f"{spec.base_prefix}.{path}"
    return inside if path not in known and inside in known else path
