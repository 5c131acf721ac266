"""Types that change a weight by a dense, sparse or Kronecker matrix, or by one derived from the weight."""

from __future__ import annotations

from deltas.errors import InvalidDelta
from deltas.formats.files import listed
from deltas.formats.header import shown
from deltas.formats.patterns import Patterns
from deltas.formats.peft.keys import Keys, biases, tuner
from deltas.formats.peft.low_rank import demand_shared, tuned
from deltas.formats.peft.reading import PREFIX, SHARED, Reading, Wrapped, sources
from deltas.formats.peft.targets import check_targets
from deltas.formats.plan import one_of
from deltas.formats.sources import Source
from deltas.methods.base import number
from deltas.methods.per_site import whole
from deltas.sites import SiteKind

_LYCORIS = (
    "r",
    "alpha",
    "rank_dropout",
    "module_dropout",
    "use_effective_conv2d",
    "rank_pattern",
    "alpha_pattern",
)

LOHA_KEYS: Keys = tuner(*_LYCORIS)
LOKR_KEYS: Keys = tuner(*_LYCORIS, "decompose_both", "decompose_factor", "rank_dropout_scale")
FOURIERFT_KEYS: Keys = tuner("n_frequency", "n_frequency_pattern", "scaling", "random_loc_seed", bias=biases)
WAVEFT_KEYS: Keys = tuner(
    "n_frequency",
    "n_frequency_pattern",
    "proportional_parameters",
    "scaling",
    "random_loc_seed",
    "wavelet_family",
    use_idwt=one_of(True, False),
    bias=biases,
)
C3A_KEYS: Keys = tuner("block_size", "block_size_pattern", bias=biases)
HIRA_KEYS: Keys = tuner("r", "hira_dropout", "rank_pattern")
SHIRA_KEYS: Keys = tuner("r", "mask_type", "random_seed")
RANDLORA_KEYS: Keys = tuner(
    "r",
    "projection_prng_key",
    "randlora_dropout",
    "randlora_alpha",
    save_projection=one_of(True, False),
    sparse=one_of(True, False),
    very_sparse=one_of(True, False),
    bias=biases,
)
GLORA_KEYS: Keys = tuner("r", "config_A_B", "config_C", "config_D_E", bias=biases)
PEANUT_KEYS: Keys = tuner("r", "depth", "scaling", "act_fn")
SUPERTUNING_KEYS: Keys = tuner(
    "sparsity",
    "r",
    "lora_alpha",
    "lora_dropout",
    select_top=one_of(True, False),
    save_precomputed_indices=one_of(True, False),
)


def loha(reading: Reading) -> None:
    modules = tuned(reading, {f"hada_w{i}_{side}": f"w{i}_{side}" for i in "12" for side in "ab"})
    reading.add("loha", _scales(reading, modules), sources(modules))


def lokr(reading: Reading) -> None:
    """Either factor is whole or in two parts, by module, as its size and the rank had it."""
    parts = [f"w{i}{side}" for i in "12" for side in ("", "_a", "_b")]
    modules = reading.wrapped({f"lokr_{part}": part for part in parts}, (SiteKind.LINEAR,))
    reading.demand(modules, {})
    check_targets(reading.config.get("target_modules"), [module.path for module in modules])
    for module in modules:
        _check_factors(reading, module)
    reading.add("lokr", _scales(reading, modules), sources(modules))


def _check_factors(reading: Reading, module: Wrapped) -> None:
    """PEFT splits each size of a weight by ``decompose_factor``, or so that the first factor is the smaller one."""
    small, large = (_factor(reading, module, f"w{i}") for i in "12")
    by = reading.config.get("decompose_factor", -1)
    if small is None or large is None or type(by) is not int:
        return
    for first, second in zip(small, large, strict=True):
        if first != by if by > 0 and first * second % by == 0 else first > second:
            key = module.keys.get("w1", module.keys.get("w1_a", module.path))
            raise InvalidDelta(
                f"{shown(key)}: the factors of the weight are {list(small)} and {list(large)}, which is not how "
                f"decompose_factor {by} splits it",
                field=key,
            )


def _factor(reading: Reading, module: Wrapped, name: str) -> tuple[int, int] | None:
    """The size of a Kronecker factor, whole or in two parts; None where its tensors are no matrices."""
    first, last = (module.keys.get(key, module.keys.get(name, "")) for key in (f"{name}_a", f"{name}_b"))
    shapes = [reading.shape(key) for key in (first, last) if key]
    if len(shapes) != 2 or any(len(shape) != 2 for shape in shapes):
        return None
    return shapes[0][0], shapes[1][1]


def _scales(reading: Reading, modules: list[Wrapped]) -> dict[str, object]:
    """alpha / r, by module. Whole Kronecker factors do not show r, so the config's is what counts."""
    config = reading.config
    rank, alpha = number(config.get("r", 8), "r"), number(config.get("alpha", 8), "alpha")
    ranks, alphas = (Patterns(key, config.get(key)) for key in ("rank_pattern", "alpha_pattern"))
    scales: dict[str, float] = {}
    for module in modules:
        here = ranks.get(module.path, rank)
        if here < 1:
            raise InvalidDelta("r must be 1 or more", field="r")
        for parameter, key in module.keys.items():
            shape = reading.shape(key)
            if parameter.endswith("_b") and (not shape or shape[0] != here):
                raise InvalidDelta(
                    f"{key!r} has shape {list(shape)}, but the config gives it rank {here:g}",
                    field="r" if here == rank else "rank_pattern",
                )
        scales[module.site.name] = alphas.get(module.path, alpha) / here
    return {"scale": alpha / max(rank, 1.0), "scales": scales}


def fourierft(reading: Reading) -> None:
    modules = tuned(reading, {"fourierft_spectrum": "spectrum"})
    _hold_frequencies(reading, modules, 1000)
    reading.add("fourierft", _placed(reading, 150.0), sources(modules))


def waveft(reading: Reading) -> None:
    config: dict[str, object] = dict(_placed(reading, 25.0))
    if reading.config.get("use_idwt", True):
        one_of("db1")("wavelet_family", reading.config.get("wavelet_family", "db1"))
        config["haar"] = True
    modules = tuned(reading, {"waveft_spectrum": "spectrum"})
    if not reading.config.get("proportional_parameters"):
        _hold_frequencies(reading, modules, 2592)
    reading.add("waveft", config, sources(modules))


def _hold_frequencies(reading: Reading, modules: list[Wrapped], default: int) -> None:
    if not reading.config.get("n_frequency_pattern"):
        reading.hold((module.keys["spectrum"] for module in modules), 0, "n_frequency", default)


def _placed(reading: Reading, scale: float) -> dict[str, object]:
    """Places by a seed, which PEFT has by default too."""
    return {
        "scale": number(reading.config.get("scaling", scale), "scaling"),
        "seed": whole(reading.config.get("random_loc_seed", 777), "random_loc_seed"),
    }


def c3a(reading: Reading) -> None:
    reading.add("c3a", {}, sources(tuned(reading, {"c3a_kernel": "kernel"})))


def hira(reading: Reading) -> None:
    linear, embedding = {"hira_A": "A", "hira_B": "B"}, {"hira_embedding_A": "A", "hira_embedding_B": "B"}
    linears = reading.wrapped(linear, (SiteKind.LINEAR,))
    embeddings = reading.wrapped(embedding, (SiteKind.EMBEDDING,))
    if embeddings:
        reading.demand(embeddings, embedding)
    if linears or not embeddings:
        reading.demand(linears, linear)
    modules = [*linears, *embeddings]
    check_targets(reading.config.get("target_modules"), [module.path for module in modules])
    reading.add("hira", {}, sources(modules))


def shira(reading: Reading) -> None:
    modules = tuned(reading, {"shira_weight": "values", "shira_indices": "indices"})
    reading.add("shira", {"scale": 1.0}, sources(modules))


def randlora(reading: Reading) -> None:
    config = reading.config
    modules = tuned(reading, {"randlora_lambda": "lambda", "randlora_gamma": "gamma"})
    rank = whole(config.get("r", 32), "r", 1)
    planned: dict[str, object] = {"scale": number(config.get("randlora_alpha", 640), "randlora_alpha") / rank}
    found: dict[str, Source] = sources(modules)
    for module in modules:
        if reading.shape(module.keys["lambda"])[:1] != (rank,):
            raise InvalidDelta(f"{module.keys['lambda']!r} has another rank than r, {rank}", field="r")
    if config.get("save_projection", True):
        for side in "AB":
            found[side] = demand_shared(reading, f"randlora_{side}")
            for module in modules:  # which have a copy each
                key = f"{PREFIX}{module.path}.randlora_{side}"
                if key in reading.left:
                    reading.repeats[reading.claim(key)] = f"{SHARED}randlora_{side}"
    else:
        sparsity = (
            "very sparse" if config.get("very_sparse") else "sparse" if config.get("sparse") else "none"
        )
        seed = whole(config.get("projection_prng_key", 0), "projection_prng_key")
        planned |= {"seed": seed, "sparsity": sparsity}
    reading.add("randlora", planned, found)


def glora(reading: Reading) -> None:
    """A path that is off is saved as zeros."""
    parts = {"Xd": ".up", "Xu": ".down", "X": "", "zeros": ""}
    names = {f"glora_{path}.{part}": path + end for path in "ABCDE" for part, end in parts.items()}
    modules = reading.wrapped(names, (SiteKind.LINEAR,))
    reading.demand(modules, {})
    check_targets(reading.config.get("target_modules"), [module.path for module in modules])
    saved = {"lora": {"Xd", "Xu"}, "vector": {"X"}, "constant": {"X"}}
    options = {"AB": ("config_A_B", "lora"), "C": ("config_C", "lora"), "DE": ("config_D_E", "constant")}
    for module in modules:
        for paths, (option, default) in options.items():
            chosen = str(reading.config.get(option, default)) if paths == "AB" or module.site.bias else "none"
            for path in paths:
                has = {key.rpartition(".")[2] for name, key in module.keys.items() if name[0] == path}
                if has != saved.get(chosen, {"zeros"}):
                    raise InvalidDelta(
                        f"{module.path}: the tensors of glora_{path} are {listed(sorted(has))}, which is not "
                        f"what {option} {shown(chosen)} has",
                        field=option,
                    )
    reading.add("glora", {}, sources(modules))


def peanut(reading: Reading) -> None:
    depth = whole(reading.config.get("depth", 0), "depth")
    names = {"peanut_A.weight": "A", "peanut_B.weight": "B"}
    for index in range(min(depth, 8)):
        names[f"peanut_encoders.{index}.weight"] = f"e{index}"
        names[f"peanut_decoders.{index}.weight"] = f"d{index}"
    scale = number(reading.config.get("scaling", 1.0), "scaling")
    config = {"scale": scale, "activation": reading.config.get("act_fn", "relu")}
    reading.add("peanut", config, sources(tuned(reading, names)))


def supertuning(reading: Reading) -> None:
    config = reading.config
    names = {"supertuning_values": "values"}
    planned: dict[str, object] = {}
    if config.get("save_precomputed_indices", True):
        names["supertuning_indices"] = "indices"
    else:
        planned["largest"] = config.get("select_top", True)
    rank = config.get("r")
    if rank is not None:
        names |= {f"supertuning_lora_{side}.weight": side for side in "AB"}
        rank = whole(rank, "r", 1)
        alpha = config.get("lora_alpha")
        planned["scale"] = (2.0 * rank if alpha is None else number(alpha, "lora_alpha")) / rank
    reading.add("supertuning", planned, sources(tuned(reading, names)))
