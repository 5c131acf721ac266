"""LORA and ADALORA: low-rank factors, with all of LoRA's options."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from deltas.errors import InvalidDelta, UnsupportedDelta
from deltas.formats.header import shown
from deltas.formats.patterns import Patterns
from deltas.formats.peft.keys import LORA_REFUSED, LORA_TRAINING, Keys, biases, tuner
from deltas.formats.peft.reading import PREFIX, Reading, Wrapped, sources
from deltas.formats.peft.saved import read_tokens
from deltas.formats.peft.targets import check_targets
from deltas.formats.plan import absent, one_of
from deltas.formats.sources import Derived, Source
from deltas.methods.base import number
from deltas.sites import SiteKind

LORA_KEYS: Keys = tuner(
    "r",
    "lora_alpha",
    "rank_pattern",
    "alpha_pattern",
    "use_bdlora",
    "trainable_token_indices",
    **LORA_TRAINING,
    **LORA_REFUSED,
    use_rslora=one_of(True, False),
    use_dora=one_of(True, False),
    lora_bias=one_of(True, False),
    bias=biases,
    # Others take factors out of the frozen weights that the file does not hold: at random, by data, by quantisation.
    init_lora_weights=one_of(True, False, None, "gaussian", "eva", "orthogonal", "mica", "pissa", "olora"),
)

ADALORA_KEYS: Keys = tuner(
    "r",
    "lora_alpha",
    "init_r",
    "rank_pattern",
    # Of LoRA's, without effect here.
    "use_rslora",
    "init_lora_weights",
    "alpha_pattern",
    *("target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step"),
    **LORA_TRAINING,
    **LORA_REFUSED,
    use_dora=absent,
    lora_bias=absent,
    use_bdlora=absent,
    trainable_token_indices=absent,
    bias=biases,
)

_LINEAR = {"lora_A.weight": "A", "lora_B.weight": "B"}
_EMBEDDING = {"lora_embedding_A": "A", "lora_embedding_B": "B"}
_SPARE = ("lora_velora_embed", ".lora_monteclora_sampler.")


def lora(reading: Reading) -> None:
    """``y += s B A x`` with s = alpha / r or alpha / sqrt(r)."""
    config = reading.config
    options = {"lora_magnitude_vector": "magnitude"} if config.get("use_dora") else {}
    bias = {"lora_B.bias": "bias"} if config.get("lora_bias") else {}
    linears = reading.wrapped({**_LINEAR, **options, **bias}, (SiteKind.LINEAR,))
    embeddings = reading.wrapped({**_EMBEDDING, **options}, (SiteKind.EMBEDDING,))
    _claim_spare(reading)
    modules = [*linears, *embeddings]
    if embeddings:
        reading.demand(embeddings, {**_EMBEDDING, **options})
    if linears or not embeddings:
        reading.demand(linears, {**_LINEAR, **options, **bias})
    check_targets(config.get("target_modules"), [module.path for module in modules])
    planned: dict[str, Any] = _scales(reading, modules)
    if config.get("use_dora"):
        planned["dora"] = "peft"
    init = config.get("init_lora_weights")
    if init in ("pissa", "olora"):
        planned["init"] = init
        if init == "olora" and reading.spec.conv1d:
            raise UnsupportedDelta(
                "olora on Conv1D: PEFT decomposes the transposed weight", field="init_lora_weights"
            )
    reading.add("lora", planned, _blocked(reading, modules, sources(modules)))
    read_tokens(reading)


def _claim_spare(reading: Reading) -> None:
    for key in list(reading.left):
        if key.endswith(_SPARE[0]) or _SPARE[1] in key:
            reading.spare.add(reading.claim(key))


def _scales(reading: Reading, modules: list[Wrapped]) -> dict[str, Any]:
    """The canonical scales; ranks are compared with the tensors'."""
    config = reading.config
    rank = number(config.get("r", 8), "r")
    alpha = number(config.get("lora_alpha", 8), "lora_alpha")
    ranks, alphas = (Patterns(key, config.get(key)) for key in ("rank_pattern", "alpha_pattern"))

    def scale(alpha: float, rank: float) -> float:
        return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank

    if rank < 1:
        raise InvalidDelta("r must be 1 or more", field="r")
    scales: dict[str, float] = {}
    for module in modules:
        here = ranks.get(module.path, rank)
        shape = reading.shape(module.keys["A"])
        if not shape or shape[0] < 1 or shape[0] != here:
            raise InvalidDelta(
                f"{shown(module.keys['A'])} has shape {list(shape)}, but the config gives it rank {here:g}",
                field="r" if here == rank else "rank_pattern",
            )
        scales[module.site.name] = scale(alphas.get(module.path, alpha), here)
    return {"scale": scale(alpha, rank), "scales": scales}


def _blocked(reading: Reading, modules: list[Wrapped], plain: dict[str, Source]) -> dict[str, Source]:
    """BD-LoRA: a factor of the modules that it names is block-diagonal, and saved without the zeros."""
    chosen = reading.config.get("use_bdlora")
    if chosen in (None, False, {}):
        return plain
    known = {"target_modules_bd_a", "target_modules_bd_b", "nblocks", "match_strict"}
    if not isinstance(chosen, Mapping) or set(chosen) - known:
        raise UnsupportedDelta("use_bdlora has other keys than are known", field="use_bdlora")
    count = chosen.get("nblocks", 1)
    names = {side: chosen.get(f"target_modules_bd_{side.lower()}") or [] for side in "AB"}
    if (
        type(count) is not int
        or not 0 < count <= 4096
        or not all(isinstance(n, list) and all(isinstance(x, str) for x in n) for n in names.values())
    ):
        raise InvalidDelta("use_bdlora needs lists of names and a number of blocks", field="use_bdlora")
    for module in modules:
        for side, parts in names.items():
            if any(part in module.path for part in parts):
                plain[f"{module.site.name}/{side}"] = Derived(module.keys[side], blocks=count)
    return plain


_ADALORA = {"lora_A": "A", "lora_B": "B", "lora_E": "E"}


def adalora(reading: Reading) -> None:
    """``y += s B ((A * E) x)``: PEFT divides alpha by the initial rank and 1e-5, whatever rank is left."""
    config = reading.config
    modules = reading.wrapped(_ADALORA, (SiteKind.LINEAR,))
    reading.demand(modules, _ADALORA)
    check_targets(config.get("target_modules"), [module.path for module in modules])
    alpha, start = (
        number(config.get("lora_alpha", 8), "lora_alpha"),
        number(config.get("init_r", 12), "init_r"),
    )
    if start < 1:
        raise InvalidDelta("init_r must be 1 or more", field="init_r")
    kept = _kept(reading)
    scales: dict[str, float] = {}
    for module in modules:
        shape = reading.shape(module.keys["A"])
        wanted = kept.get(f"{PREFIX}{module.path}", start)
        if not shape or shape[0] != wanted:
            raise InvalidDelta(
                f"{shown(module.keys['A'])} has shape {list(shape)}, but the config gives it rank {wanted:g}",
                field="rank_pattern" if kept else "init_r",
            )
        scales[module.site.name] = (alpha if alpha > 0 else float(wanted)) / (start + 1e-5)
    reading.add("adalora", {"scale": alpha / (start + 1e-5), "scales": scales}, sources(modules))


def _kept(reading: Reading) -> dict[str, int]:
    """``rank_pattern``, here the ranks that training kept: a module's path -> how many."""
    pattern = reading.config.get("rank_pattern")
    if pattern in (None, {}):
        return {}
    if not isinstance(pattern, Mapping):
        raise InvalidDelta("rank_pattern must be an object", field="rank_pattern")
    kept: dict[str, int] = {}
    for name, mask in pattern.items():
        if not isinstance(mask, list) or not all(type(keep) is bool for keep in mask):
            raise InvalidDelta("rank_pattern must hold lists of true and false", field="rank_pattern")
        path = str(name).removesuffix(".lora_E")
        kept[path if path.startswith(PREFIX) else PREFIX + path] = sum(mask)
    return kept
