"""Types that rotate or scale what a module reads or gives, shift it, or replace a norm."""

from __future__ import annotations

from deltas.errors import InvalidDelta
from deltas.formats.header import shown
from deltas.formats.peft.keys import Keys, biases, tuner
from deltas.formats.peft.low_rank import tuned
from deltas.formats.peft.reading import Reading, sources
from deltas.formats.peft.targets import check_targets
from deltas.formats.plan import one_of
from deltas.formats.sources import Derived, Source
from deltas.methods.base import number
from deltas.methods.per_site import whole
from deltas.sites import SiteKind

OFT_KEYS: Keys = tuner(
    "r",
    "oft_block_size",
    "module_dropout",
    "eps",
    "num_cayley_neumann_terms",
    coft=one_of(True, False),
    block_share=one_of(True, False),
    use_cayley_neumann=one_of(True, False),
    bias=biases,
)
BOFT_KEYS: Keys = tuner(
    "boft_block_size", "boft_block_num", "boft_n_butterfly_factor", "boft_dropout", bias=biases
)
HRA_KEYS: Keys = tuner("r", apply_GS=one_of(True, False), bias=biases)
ROAD_KEYS: Keys = tuner("group_size", variant=one_of("road_1", "road_2", "road_4"))
IA3_KEYS: Keys = tuner("feedforward_modules", "init_ia3_weights")
LN_TUNING_KEYS: Keys = tuner()
BEFT_KEYS: Keys = tuner()


def oft(reading: Reading) -> None:
    config = reading.config
    linears = reading.wrapped({"oft_R.weight": "Q"}, (SiteKind.LINEAR,))
    embeddings = reading.wrapped({"oft_embedding_R.weight": "Q"}, (SiteKind.EMBEDDING,))
    modules = [*linears, *embeddings]
    reading.demand(modules, {"oft_R.weight": "Q"})
    check_targets(config.get("target_modules"), [module.path for module in modules])
    planned: dict[str, object] = {}
    if config.get("use_cayley_neumann", True):
        terms = whole(config.get("num_cayley_neumann_terms", 5), "num_cayley_neumann_terms", 1)
        if terms > 64:
            raise InvalidDelta(
                "num_cayley_neumann_terms must be at most 64", field="num_cayley_neumann_terms"
            )
        planned["terms"] = terms
    if config.get("block_share"):
        planned["shared"] = True
    if config.get("coft"):
        planned["limit"] = number(config.get("eps", 6e-5), "eps")
    reading.add("oft", planned, sources(modules))


def boft(reading: Reading) -> None:
    modules = tuned(reading, {"boft_R": "R", "boft_s": "s"})
    found: dict[str, Source] = sources(modules)
    found |= {f"{module.site.name}/s": Derived(module.keys["s"], shape=(-1,)) for module in modules}
    factors = whole(reading.config.get("boft_n_butterfly_factor", 1), "boft_n_butterfly_factor", 1)
    for module in modules:
        shape = reading.shape(module.keys["R"])
        if shape[:1] not in (
            (1,),
            (factors,),
        ):  # where PEFT had no compiler, it made one whatever the config says
            raise InvalidDelta(
                f"{shown(module.keys['R'])} has shape {list(shape)}, but boft_n_butterfly_factor is {factors}",
                field="boft_n_butterfly_factor",
            )
    reading.add("boft", {}, found)


def hra(reading: Reading) -> None:
    config = {"orthogonal": bool(reading.config.get("apply_GS", False))}
    modules = tuned(reading, {"hra_u": "u"})
    rank = whole(reading.config.get("r", 8), "r", 1)
    for module in modules:
        shape = reading.shape(module.keys["u"])
        if shape[1:] != (rank,):
            raise InvalidDelta(
                f"{shown(module.keys['u'])} has shape {list(shape)}, but r is {rank}", field="r"
            )
    reading.add("hra", config, sources(modules))


def road(reading: Reading) -> None:
    variant = int(str(reading.config.get("variant", "road_1"))[-1])
    group = whole(reading.config.get("group_size", 64), "group_size", 2)
    modules = tuned(reading, {"road_theta": "theta", "road_alpha": "alpha"})
    reading.add("road", {"variant": variant, "group": group}, sources(modules))


def ia3(reading: Reading) -> None:
    """A row scales the input, a column the output, bias included; the shapes say which."""
    found: dict[str, Source] = {}
    for module in tuned(reading, {"ia3_l": "l"}):
        key = module.keys["l"]
        shape = reading.shape(key)
        if len(shape) != 2 or 1 not in shape:
            raise InvalidDelta(f"{key!r} has shape {list(shape)}, expected [1, in] or [out, 1]", field=key)
        parameter = "gain" if shape[1] == 1 else "input_gain"
        inner = reading.config.get("feedforward_modules") or []
        if isinstance(inner, list) and any(
            isinstance(name, str) and module.path.endswith(name) for name in inner
        ) != (parameter == "input_gain"):
            raise InvalidDelta(
                f"{key!r} has shape {list(shape)}, which feedforward_modules contradicts", field=key
            )
        found[f"{module.site.name}/{parameter}"] = Derived(key, shape=(-1,))
    reading.add("ia3", {}, found)


def ln_tuning(reading: Reading) -> None:
    """Copies of modules, mostly norms: absolute values."""
    names = {"ln_tuning_layers.weight": "weight", "ln_tuning_layers.bias": "bias"}
    modules = reading.wrapped(names)
    reading.demand(modules, {"ln_tuning_layers.weight": "weight"})
    check_targets(reading.config.get("target_modules"), [module.path for module in modules])
    for module in modules:
        if module.site.bias and "bias" not in module.keys:
            key = module.keys["weight"].removesuffix("weight") + "bias"
            raise InvalidDelta(f"{reading.file}: missing tensor: {key!r}", field=key)
    norms = all(module.site.kind is SiteKind.NORM for module in modules)
    found = {
        f"{module.site.name}/{parameter}": reading.stored(module.site, parameter, key)
        for module in modules
        for parameter, key in module.keys.items()
    }
    reading.add("ln" if norms else "override", {}, found)


def beft(reading: Reading) -> None:
    modules = tuned(reading, {"beft_bias": "beta"})
    found = {f"{module.site.name}/beta": Derived(module.keys["beta"], shape=(-1,)) for module in modules}
    reading.add("bitfit", {}, found)
