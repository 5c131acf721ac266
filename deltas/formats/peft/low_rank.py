"""Types that add low-rank matrices made in other ways than LoRA's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from deltas.errors import InvalidDelta
from deltas.formats.header import shown
from deltas.formats.peft.keys import Keys, biases, tuner
from deltas.formats.peft.reading import Reading, Wrapped, sources
from deltas.formats.peft.targets import check_targets, named_linears
from deltas.formats.plan import absent, one_of
from deltas.formats.sources import Derived, Source
from deltas.methods.base import number
from deltas.methods.per_site import whole
from deltas.sites import SiteKind

_LINEAR = (SiteKind.LINEAR,)
_BOTH = (SiteKind.LINEAR, SiteKind.EMBEDDING)

VERA_KEYS: Keys = tuner(
    "r", "projection_prng_key", "vera_dropout", "d_initial", save_projection=one_of(True, False), bias=biases
)
PVERA_KEYS: Keys = tuner(
    "r",
    "projection_prng_key",
    "pvera_dropout",
    "d_initial",
    "generator_seed",
    save_projection=one_of(True, False),
    sample_at_inference=absent,  # the output would be random
    bias=biases,
)
DELORA_KEYS: Keys = tuner(
    "r", "delora_lambda", "module_dropout", "rank_pattern", "lambda_pattern", bias=biases
)
MISS_KEYS: Keys = tuner(
    "r", "miss_dropout", "mini_r", bias=biases, init_weights=one_of(True, False, None, "bat", "mini")
)
VBLORA_KEYS: Keys = tuner(
    "r",
    "num_vectors",
    "vector_length",
    "topk",
    "vblora_dropout",
    "init_vector_bank_bound",
    "init_logits_std",
    save_only_topk_weights=one_of(True, False),
    bias=biases,
)
UNILORA_KEYS: Keys = tuner(
    "r",
    "proj_seed",
    "theta_d_length",
    "unilora_dropout",
    "init_theta_d_bound",
    save_indices=one_of(True, False),
    bias=biases,
)
TINYLORA_KEYS: Keys = tuner(
    "r",
    "u",
    "weight_tying",
    "projection_seed",
    "tinylora_dropout",
    "init_v_bound",
    save_projection=one_of(True, False),
    bias=biases,
)
GRALORA_KEYS: Keys = tuner("r", "hybrid_r", "alpha", "gralora_dropout", "gralora_k", bias=biases)
DEFT_KEYS: Keys = tuner(
    "r",
    "init_scale",
    "alpha",
    "deft_dropout",
    decomposition_method=one_of("relu", "qr"),
    para=one_of(True, False),
    bias=biases,
)


def tuned(
    reading: Reading,
    parameters: Mapping[str, str],
    kinds: tuple[SiteKind, ...] = _LINEAR,
    optional: Mapping[str, str] | None = None,
) -> list[Wrapped]:
    """The wrapped modules, complete, and the same that ``target_modules`` names."""
    modules = reading.wrapped({**parameters, **(optional or {})}, kinds)
    reading.demand(modules, parameters)
    check_targets(reading.config.get("target_modules"), [module.path for module in modules])
    return modules


def vera(reading: Reading) -> None:
    """Also PVERA."""
    _vera(reading, "vera", {})


def pvera(reading: Reading) -> None:
    """Evaluation uses the means only."""
    _vera(reading, "pvera", {"probabilistic": True})


def _vera(reading: Reading, name: str, config: dict[str, Any]) -> None:
    modules = tuned(reading, {f"{name}_lambda_b": "b", f"{name}_lambda_d": "d"})
    reading.hold((module.keys["d"] for module in modules), 0, "r", 256, 2 if config else 1)
    found: dict[str, Source] = sources(modules)
    if reading.config.get("save_projection", True):
        widest = {
            "A": (1, max((module.site.in_features for module in modules), default=0)),
            "B": (0, max((module.site.out_features for module in modules), default=0)),
        }
        for side, (dimension, size) in widest.items():
            key = found[side] = demand_shared(reading, f"{name}_{side}")
            shape = reading.shape(key)
            if len(shape) != 2 or shape[dimension] != size:
                raise InvalidDelta(
                    f"{shown(key)} has shape {list(shape)}; the widest module needs {size}", field=key
                )
    else:
        config = config | {"seed": whole(reading.config.get("projection_prng_key", 0), "projection_prng_key")}
    reading.add("vera", config, found)


def demand_shared(reading: Reading, name: str) -> str:
    """Claim a tensor of the whole model, which must be there."""
    key = reading.shared(name)
    if key is None:
        key = f"base_model.{name}"
        raise InvalidDelta(f"{reading.file}: missing tensor: {key!r}", field=key)
    return key


def delora(reading: Reading) -> None:
    names = {"A": "A", "B": "B", "lambda": "lambda", "w_norm": "norm"}
    modules = tuned(reading, {f"delora_{suffix}": name for suffix, name in names.items()})
    reading.add("delora", {}, sources(modules))


def miss(reading: Reading) -> None:
    modules = tuned(reading, {"miss_block": "block"})
    variant = reading.config.get("init_weights", True)
    reading.hold((module.keys["block"] for module in modules), 1 if variant == "bat" else 0, "r", 64)
    rank = whole(reading.config.get("r", 64), "r", 1)
    for module in modules:
        shape = reading.shape(module.keys["block"])
        expected: tuple[object, ...] = (rank, module.site.out_features)
        if variant == "bat":
            expected = (module.site.out_features // rank, rank, rank)
        elif variant == "mini":
            expected = (rank, reading.config.get("mini_r", 1))
        if shape != expected:
            raise InvalidDelta(
                f"{module.keys['block']!r} has shape {list(shape)}, the config gives it {list(expected)}",
                field="r" if shape[:1] != expected[:1] else "init_weights",
            )
    reading.add("miss", {}, sources(modules))


def vblora(reading: Reading) -> None:
    if reading.config.get("save_only_topk_weights"):
        names = {
            f"vblora_logits_{side}_topk_{kind}": f"{kind}_{side}"
            for side in "AB"
            for kind in ("indices", "weights")
        }
    else:
        names = {f"vblora_logits_{side}": f"logits_{side}" for side in "AB"}
    modules = tuned(reading, names)
    bank = demand_shared(reading, "vblora_vector_bank")
    reading.hold([bank], 0, "num_vectors", 256)
    reading.hold([bank], 1, "vector_length", 256)
    topk = whole(reading.config.get("topk", 2), "topk", 1)
    reading.add("vblora", {"topk": topk}, {**sources(modules), "bank": bank})


def unilora(reading: Reading) -> None:
    theta = demand_shared(reading, "unilora_theta_d")
    reading.hold([theta], 0, "theta_d_length", 256)
    if reading.config.get("save_indices"):
        names = {
            f"unilora_{kind}_{side}": f"{kind}_{side}" for side in "AB" for kind in ("indices", "scales")
        }
        reading.add("unilora", {}, {**sources(tuned(reading, names)), "theta": theta})
        return
    sites = named_linears(reading.config, reading.spec)
    config = {
        "seed": whole(reading.config.get("proj_seed", 42), "proj_seed"),
        "rank": whole(reading.config.get("r", 4), "r", 1),
        "sites": [site.name for site in sites],
    }
    reading.add("unilora", config, {"theta": theta})


def tinylora(reading: Reading) -> None:
    """The trained numbers are shared by groups of modules, dealt in the order of the model's modules."""
    saved = reading.config.get("save_projection", True)
    names = {"tinylora_A": "A", "tinylora_B": "B"} | ({"tinylora_P": "P"} if saved else {})
    by_site = {module.site: module for module in tuned(reading, names, _BOTH)}
    modules = [by_site[site] for site in reading.spec.in_module_order(by_site)]
    tying = number(reading.config.get("weight_tying", 0.0), "weight_tying")
    if not 0 <= tying <= 1:
        raise InvalidDelta("weight_tying must be from 0 to 1", field="weight_tying")
    seed = whole(reading.config.get("projection_seed", 42), "projection_seed")
    groups = max(1, round(len(modules) * (1.0 - tying)))
    size = max(1, len(modules) // groups)
    found: dict[str, Source] = sources(modules)
    seeds: dict[str, int] = {}
    for index, module in enumerate(modules):
        key = f"base_model.tinylora_v.{min(index // size, groups - 1)}"
        if key not in reading.header.tensors:
            raise InvalidDelta(f"{reading.file}: missing tensor: {key!r}", field=key)
        reading.left.pop(key, None)
        found[f"{module.site.name}/v"] = Derived(key)
        seeds[module.site.name] = seed + index
    reading.add("tinylora", {} if saved else {"seeds": seeds}, found)


def gralora(reading: Reading) -> None:
    rank, hybrid = (
        whole(reading.config.get("r", 32), "r", 1),
        whole(reading.config.get("hybrid_r", 0), "hybrid_r"),
    )
    names = {"gralora_A": "A", "gralora_B": "B"}
    general = {f"gralora_{side}_general.weight": f"general_{side}" for side in "AB"}
    modules = tuned(reading, {**names, **general} if hybrid else names)
    for module in modules:
        shape = reading.shape(module.keys["A"])
        other = reading.shape(module.keys["general_A"])[:1] if hybrid else (0,)
        if shape[-1:] != (rank,) or other != (hybrid,):
            raise InvalidDelta(
                f"{module.keys['A']!r} has shape {list(shape)}, but r is {rank} and hybrid_r {hybrid}",
                field="r",
            )
    scale = number(reading.config.get("alpha", 64), "alpha") / (rank + hybrid)
    reading.add("gralora", {"scale": scale}, sources(modules))


def deft(reading: Reading) -> None:
    config = reading.config
    names = {"deft_P": "P"} if config.get("para") else {"deft_P": "P", "deft_R": "R"}
    modules = tuned(reading, names)
    reading.hold((module.keys["P"] for module in modules), 1, "r", 8)
    alpha = config.get("alpha")
    scales = {
        module.site.name: number(alpha, "alpha") / max(1, reading.shape(module.keys["P"])[-1])
        if alpha
        else 1.0
        for module in modules
        if reading.shape(module.keys["P"])
    }
    orthogonal = config.get("decomposition_method", "relu") == "qr"
    reading.add("deft", {"scale": 1.0, "scales": scales, "orthogonal": orthogonal}, sources(modules))
