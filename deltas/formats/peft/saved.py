"""What comes beside a type's own tensors: ``modules_to_save``, biases, copies of embeddings, trained tokens, task heads.

Plain ``base_model.model.<path>.weight|bias`` are absolute values. PEFT names a wrapped module's own ``<path>.base_layer``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from deltas.errors import InvalidDelta
from deltas.formats.files import listed
from deltas.formats.header import shown
from deltas.formats.peft.heads import head_modules
from deltas.formats.peft.keys import TASKS
from deltas.formats.peft.reading import PREFIX, Reading, split_key
from deltas.formats.sources import Derived, Given, Source, Zeros
from deltas.sites import Site, SiteKind

# Names by which PEFT decides to save copies: of these, and of the input embedding whatever its name.
_EMBEDDINGS = ("embed_tokens", "lm_head")
_UNTRAINED, _TRAINED = ".original_module.", ".modules_to_save."
_TOKENS = "trainable_tokens_delta"
_MAX_TOKENS = 1 << 20
# A head's bias has two names in these models.
_ALIASES = {"bert": ("cls.predictions", "cls.predictions.decoder"), "roberta": ("lm_head", "lm_head.decoder")}


def read_saved(reading: Reading) -> None:
    """Claim absolute values: ``modules_to_save``, ``bias`` and copies of the backbone's embeddings."""
    names = reading.config.get("modules_to_save")
    if names is not None and (
        not isinstance(names, list) or not all(isinstance(name, str) and name for name in names)
    ):
        raise InvalidDelta("modules_to_save must be a list of names", field="modules_to_save")
    bias = reading.config.get("bias", "none")
    of_head = head_modules(reading.spec, reading.config.get("task_type"))
    if bias == "all":
        _inner(reading)
    found: dict[str, Source] = {}
    for key in list(reading.left):
        split = split_key(key, ("weight", "bias"))
        if split is None:
            continue
        path, parameter = split
        if path in of_head:
            continue
        wrapped = path.removesuffix(".base_layer")
        if wrapped != path:
            _base_layer(reading, key, wrapped, parameter, bias, found)
            continue
        site = reading.site(key, path)
        chosen = _is_chosen(path, names or ())
        if parameter == "bias" and (chosen or bias == "all") and _repeated(reading, key, path):
            continue
        if site is None:
            continue
        if chosen or (parameter == "bias" and bias == "all"):
            _put(reading, found, site, parameter, key)
        elif _is_copy(path, site):
            reading.copies[reading.claim(key)] = f"{site.path}.{parameter}"
    _demand(reading, names or (), bias, found)
    if found:
        reading.add("override", {}, found)


def _inner(reading: Reading) -> None:
    """With every bias PEFT also saves those inside its wrappers: the untrained one, and the trained under a second name."""
    for key in list(reading.left):
        path, wrapper, parameter = key.partition(_UNTRAINED)
        if wrapper and parameter.endswith("bias"):
            reading.spare.add(reading.claim(key))
        path, wrapper, parameter = key.partition(_TRAINED)
        for inner in (parameter, parameter.partition(".")[2]):  # as it is, or after the adapter's name
            if wrapper and f"{path}.{inner}" in reading.header.tensors:
                reading.repeats[reading.claim(key)] = f"{path}.{inner}"
                break


def _demand(
    reading: Reading, names: list[str] | tuple[()], bias: object, found: Mapping[str, Source]
) -> None:
    """What the config names must be in the file: PEFT would go on with the backbone's own."""
    within = reading.spec.base_prefix + "." if reading.config.get("task_type") in TASKS else ""
    for site in reading.spec.sites.values():
        path = site.path
        if site.part or site.kind in (SiteKind.BLOCK, SiteKind.KV) or not path.startswith(within):
            continue
        named = _is_chosen(path, names)
        biased = bias == "all" or (bias != "none" and site.name in reading.tuned)
        for parameter, wanted, field in (
            ("weight", named, "modules_to_save"),
            ("bias", site.bias and (named or biased), "modules_to_save" if named else "bias"),
        ):
            if wanted and f"{site.name}/{parameter}" not in found:
                raise InvalidDelta(
                    f"{reading.file} does not hold {path}.{parameter}, which {field} demands", field=field
                )


def _is_chosen(path: str, names: list[str] | tuple[()]) -> bool:
    """PEFT takes a module whose path ends with a name, at a dot or not, and all that is in it."""
    parts = path.split(".")
    within = (".".join(parts[:end]) for end in range(1, len(parts) + 1))
    return any(outer.endswith(name) for outer in within for name in names)


def _base_layer(
    reading: Reading, key: str, path: str, parameter: str, bias: object, found: dict[str, Source]
) -> None:
    site = reading.site(key, path)
    if site is None:
        return
    if parameter == "bias" and bias != "none":
        _put(reading, found, site, parameter, key)
    elif _is_copy(path, site):
        reading.copies[reading.claim(key)] = f"{site.path}.{parameter}"


def _is_copy(path: str, site: Site) -> bool:
    return path.rpartition(".")[2] in _EMBEDDINGS or site.name == "embed"


def _put(reading: Reading, found: dict[str, Source], site: Site, parameter: str, key: str) -> None:
    name = f"{site.name}/{parameter}"
    if name in found:
        raise InvalidDelta(f"{shown(key)} is a second {name}", field=key)
    found[name] = reading.stored(site, parameter, reading.claim(key))


def _repeated(reading: Reading, key: str, path: str) -> bool:
    """Is it a head's bias under its second name? Then it must equal the first."""
    alias, own = _ALIASES.get(reading.spec.family, ("", ""))
    if path != alias:
        return False
    first = f"{PREFIX}{own}.bias"
    if first not in reading.header.tensors:
        raise InvalidDelta(f"{reading.file}: missing tensors: {listed([first])}", field=first)
    reading.repeats[reading.claim(key)] = first
    return True


def read_tokens(reading: Reading) -> None:
    """Claim ``trainable_token_indices``' rows: of the input embedding, and, where it is tied, of all that it is tied to."""
    chosen = reading.config.get("trainable_token_indices")
    suffix = f"token_adapter.{_TOKENS}"
    keys = {key: split[0] for key in reading.left if (split := split_key(key, (suffix,)))}
    if not chosen:
        return
    given: Mapping[str, Any] = chosen if isinstance(chosen, Mapping) else {}
    for key, path in keys.items():
        matching = [name for name in given if path == name or path.endswith(name)]
        if given and not matching:
            raise InvalidDelta(
                f"{shown(key)}: trainable_token_indices does not name {shown(path)}", field=key
            )
        indices = given[matching[0]] if given else chosen
        _add_tokens(reading, key, path, _indices(indices, "trainable_token_indices"))
    if not keys:
        raise InvalidDelta(
            f"{reading.file} holds no trained tokens, which the config names", field="trainable_token_indices"
        )


def trainable_tokens(reading: Reading) -> None:
    """The TRAINABLE_TOKENS type. What is tied to the input embedding is repeated in the file, and follows it."""
    indices = _indices(reading.config.get("token_indices"), "token_indices")
    keys = {split[0]: key for key in reading.left if (split := split_key(key, (_TOKENS,)))}
    own = [path for path in keys if _is_input(reading, path)]
    embed = reading.spec.sites["embed"]
    if reading.spec.tied and not own and not embed.refused and keys.keys() & _followers(reading).keys():
        missing = f"{PREFIX}{embed.path}.{_TOKENS}"
        raise InvalidDelta(f"{reading.file}: missing tensors: {listed([missing])}", field=missing)
    if reading.spec.tied and own:
        first = keys.pop(own[0])
        for path, key in list(keys.items()):
            if path in _followers(reading):
                reading.repeats[reading.claim(key)] = first
                del keys[path]
        _add_tokens(reading, first, own[0], indices)
    for path, key in keys.items():
        _add_rows(reading, key, path, indices)
    if not reading.components:
        reading.refuse_left()
        raise InvalidDelta(f"{reading.file} holds no trained tokens", field=reading.file)


def _indices(value: object, key: str) -> tuple[int, ...]:
    if (
        not isinstance(value, list)
        or not 0 < len(value) <= _MAX_TOKENS
        or not all(type(index) is int and 0 <= index < 1 << 62 for index in value)
    ):
        raise InvalidDelta(f"{key} must be a list of token ids", field=key)
    return tuple(value)


def _is_input(reading: Reading, path: str) -> bool:
    site = reading.spec.site_at(path)
    return site is not None and site.name == "embed"


def _followers(reading: Reading) -> dict[str, Site]:
    """What is tied to the input embedding: the head, and a T5 stack's own module for it."""
    names = ("encoder.embed", "decoder.embed", "head")
    return {site.path: site for name in names if (site := reading.spec.sites.get(name)) is not None}


def _add_tokens(reading: Reading, key: str, path: str, indices: tuple[int, ...]) -> None:
    """Rows of an embedding; of the input embedding, for everything that is tied to it too."""
    if not (reading.spec.tied and _is_input(reading, path)):
        _add_rows(reading, key, path, indices)
        return
    embed = reading.spec.sites["embed"]
    called = [] if embed.refused else [embed]
    reading.claim(key)
    _add(reading, [*called, *_followers(reading).values()], key, indices)


def _add_rows(reading: Reading, key: str, path: str, indices: tuple[int, ...]) -> None:
    site = reading.site(key, path)
    if site is not None:
        _add(reading, [site], reading.claim(key), indices)


def _add(reading: Reading, sites: list[Site], key: str, indices: tuple[int, ...]) -> None:
    found: dict[str, Any] = {}
    for site in sites:
        found |= {f"{site.name}/rows": Derived(key), f"{site.name}/indices": Given(indices)}
        if site.kind is SiteKind.LINEAR and site.bias:
            # PEFT computes such a head from its weight alone, in training as well
            reading.add("override", {}, {f"{site.name}/bias": Zeros((site.out_features,))})
    reading.add("tokens", {}, found)
