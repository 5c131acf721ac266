"""AdapterHub's bottlenecks: ``seq_bn``, ``double_seq_bn``, ``par_bn``, ``compacter`` and their options.

With h a sublayer's output, i the residual, N the norm that follows their sum (post-norm models) or nothing, and ``up``
what the adapter adds (its scale, gate and own norms included), the library computes

    sequential   z = N(h + i) if original_ln_before else h
                 r = h, or h + i ("post_add"), or z, by residual_before_ln
                 out = N(up(z) + r + i) if original_ln_after else up(z) + r
    parallel     out = N(up(i) + h + i), or without original_ln_after up(i) + h

and the backbone goes on from N(h' + i), h' being what a :class:`~deltas.patches.Bottleneck` leaves. What has no such form,
because the residual or the norm is dropped, is refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from deltas.errors import InvalidDelta, UnsupportedDelta
from deltas.formats.adapterhub import places
from deltas.formats.adapterhub.keys import Keys
from deltas.formats.adapterhub.options import (
    BOTTLENECK_DEFAULTS,
    BOTTLENECK_KEYS,
    Config,
    activation,
    left_out,
    positive,
)
from deltas.formats.header import shown
from deltas.formats.plan import PlannedComponent, check_config, printable
from deltas.formats.sources import Source
from deltas.methods import gates
from deltas.methods.base import number
from deltas.patches import BlockInput
from deltas.sites import BackboneSpec

LOCATIONS = ("mh_adapter", "output_adapter", "cross_adapter")


@dataclass(frozen=True, slots=True)
class Around:
    """What an adapter reads and adds to; ``after_norm``: it stands after the norm that follows the block."""

    reads: BlockInput
    onto: BlockInput = BlockInput.OUTPUT
    after_norm: bool = False


@dataclass(frozen=True, slots=True)
class Read:
    """A bottleneck's configuration and tensors: ``sources`` maps ``<site>/<parameter>`` to the file's."""

    config: Config
    around: Around
    method: str
    canonical: Mapping[str, Any]
    sources: Mapping[str, Source]


def read(config: Mapping[str, Any], keys: Keys, where: str) -> Read:
    """One bottleneck configuration. Raises :class:`InvalidDelta` or :class:`UnsupportedDelta`."""
    check_config(config, BOTTLENECK_KEYS, where)
    options = {**BOTTLENECK_DEFAULTS, **config}
    around = around_of(options, keys.spec)
    canonical: dict[str, Any] = {
        "activation": activation(options.get("non_linearity"), versioned=keys.versioned),
        "reads": around.reads.value,
        "onto": around.onto.value,
        "scale": 1.0 if options["scaling"] in ("learned", "channel") else _scale(options["scaling"]),
        # the sum is the norm's input only where it is formed before the norm
        "norm_around": options["ln_after"]
        and options["adapter_residual_before_ln"]
        and not options["is_parallel"],
    }
    sources: dict[str, Source] = {}
    sites: list[str] = []
    for layer, stem, site in _locations(options, keys):
        sources |= _tensors(options, keys, stem, site)
        _check_width(options, keys, stem, layer)
        sites.append(site)
    if not sites:
        raise InvalidDelta("the config places no adapter in any layer", field="config")
    if not options["phm_layer"]:
        return Read(options, around, "bottleneck", canonical, sources)
    sources |= _shared(options, keys)
    if not any("/" in name for name in sources):
        canonical["sites"] = sites
    return Read(options, around, "compacter", canonical, sources)


def components(config: Mapping[str, Any], keys: Keys, where: str) -> Iterator[PlannedComponent]:
    """The components of one bottleneck configuration. Raises as :func:`read` does."""
    found = read(config, keys, where)
    yield PlannedComponent(found.method, found.canonical, found.sources)
    if found.config["inv_adapter"]:
        yield _invertible(found, keys)


def around_of(config: Config, spec: BackboneSpec) -> Around:
    """Where the adapter stands; refuses sums that a backbone with its own residual and norm cannot give."""
    before, after, residual = (
        config[key] for key in ("original_ln_before", "original_ln_after", "residual_before_ln")
    )
    if config["is_parallel"]:
        if not after:
            raise UnsupportedDelta("a parallel adapter drops the residual", field="original_ln_after")
        return Around(BlockInput.RESIDUAL)
    summed = BlockInput.OUTPUT_AND_RESIDUAL if spec.pre_norm else BlockInput.NORMED
    reads = summed if before else BlockInput.OUTPUT
    if residual == "post_add":
        if spec.pre_norm or not before:
            raise UnsupportedDelta(
                "residual_before_ln 'post_add' fails in the library where no norm comes before the adapter",
                field="residual_before_ln",
            )
        onto = BlockInput.OUTPUT_AND_RESIDUAL
    else:
        onto = BlockInput.OUTPUT if residual else reads
    if after:
        return Around(reads, onto)
    if spec.pre_norm and onto is BlockInput.OUTPUT_AND_RESIDUAL:
        return Around(reads)
    if not spec.pre_norm and onto is BlockInput.NORMED:
        return Around(BlockInput.OUTPUT, after_norm=True)
    raise UnsupportedDelta(
        f"with original_ln_before {before}, original_ln_after {after} and residual_before_ln {residual} the residual "
        "or the norm of the backbone is dropped, which is not served",
        field="original_ln_after",
    )


def _scale(scaling: object) -> float:
    if isinstance(scaling, str):
        raise InvalidDelta(f"scaling is {shown(scaling)}: a number, learned or channel", field="scaling")
    return number(scaling, "scaling")


def _locations(config: Config, keys: Keys) -> Iterator[tuple[int, str, str]]:
    """Layer, path of the adapter's module and site of every adapter."""
    skipped, around = left_out(config), around_of(config, keys.spec)
    if config["cross_adapter"] and keys.spec.kind != "encoder-decoder":
        raise UnsupportedDelta("cross_adapter is for encoder-decoders", field="cross_adapter")
    for location in LOCATIONS:
        if location not in config:
            raise InvalidDelta(f"config lacks {location}", field=location)
        if not config[location]:
            continue
        for place in places.bottlenecks(location, keys.spec):
            if place.layer in skipped:
                continue
            if config["use_gating"]:
                gates.check_gate(place.site, keys.spec, "use_gating")
            site = place.site.removesuffix("out") + "norm" if around.after_norm else place.site
            yield place.layer, f"{place.module}.adapters.{keys.name}", site


def _tensors(config: Config, keys: Keys, stem: str, site: str) -> dict[str, Source]:
    found: dict[str, Source] = {}
    at = 1 if config["ln_before"] else 0
    if config["ln_before"]:
        named, first = f"{stem}.adapter_norm_before", f"{stem}.adapter_down.0"
        for ours, theirs in (("norm_before", "weight"), ("norm_before_bias", "bias")):
            # one norm under two names; a file that has each tensor once may have it under either
            if f"{named}.{theirs}" in keys:
                keys.repeat(f"{first}.{theirs}", f"{named}.{theirs}")
            name = named if f"{named}.{theirs}" in keys else first
            found[f"{site}/{ours}"] = keys.key(f"{name}.{theirs}")
    for side, module in (("down", f"{stem}.adapter_down.{at}"), ("up", f"{stem}.adapter_up")):
        names = (
            _hypercomplex(config, side) if config["phm_layer"] else {side: "weight", f"{side}_bias": "bias"}
        )
        for ours, theirs in names.items():
            found[f"{site}/{ours}"] = keys.key(f"{module}.{theirs}")
    if config["scaling"] in ("learned", "channel"):
        found[f"{site}/scaling"] = keys.key(f"{stem}.scaling")
    for option, ours, theirs in (
        ("ln_after", "norm_after", "adapter_norm_after"),
        ("use_gating", "gate", "gate"),
    ):
        if config[option]:
            found[f"{site}/{ours}"] = keys.key(f"{stem}.{theirs}.weight")
            found[f"{site}/{ours}_bias"] = keys.key(f"{stem}.{theirs}.bias")
    return found


def _hypercomplex(config: Config, side: str) -> dict[str, str]:
    """One projection's own tensors: our name -> the library's."""
    found: dict[str, str] = {}
    if not config["shared_W_phm"]:
        parts = {f"{side}_left": "W_left", f"{side}_right": "W_right"}
        found |= parts if config["factorized_phm_W"] else {side: "W"}
    if not config["shared_phm_rule"]:
        parts = {f"{side}_rule_left": "phm_rule_left", f"{side}_rule_right": "phm_rule_right"}
        found |= parts if config["factorized_phm_rule"] else {f"{side}_rule": "phm_rule"}
    if config["phm_bias"]:
        found[f"{side}_bias"] = "b"
    return found


def _shared(config: Config, keys: Keys) -> dict[str, Source]:
    """What all layers of a Compacter share."""
    names: dict[str, str] = {}
    if config["shared_phm_rule"]:
        parts = {"rule_left": "phm_rule_left", "rule_right": "phm_rule_right"}
        names |= parts if config["factorized_phm_rule"] else {"rule": "phm_rule"}
    if config["shared_W_phm"]:
        for side in ("down", "up"):
            parts = {f"{side}_left": f"W_{side}_left", f"{side}_right": f"W_{side}_right"}
            names |= parts if config["factorized_phm_W"] else {side: f"W_{side}"}
    return {ours: keys.key(f"shared_parameters.{keys.name}.{theirs}") for ours, theirs in names.items()}


def _check_width(config: Config, keys: Keys, stem: str, layer: int) -> None:
    """The file's width must be what the config gives."""
    hidden, factor = keys.spec.hidden, config.get("reduction_factor")
    if isinstance(factor, Mapping):
        factor = factor.get(str(layer), factor.get("default"))
        if factor is None:
            raise InvalidDelta(f"reduction_factor has no entry for layer {layer}", field="reduction_factor")
    value = number(factor, "reduction_factor")
    if value <= 0:
        raise InvalidDelta(
            f"reduction_factor must be above 0, not {printable(str(value))}", field="reduction_factor"
        )
    width = max(1, int(min(hidden // value, float(1 << 40))))
    if config["phm_layer"]:
        _check_pieces(config, keys, stem, width)
        return
    path = f"{stem}.adapter_down.{1 if config['ln_before'] else 0}.weight"
    shape = keys.shape(path)
    if not shape or shape[0] != width:
        raise InvalidDelta(
            f"{shown(keys.key(path))} has shape {list(shape)}, but reduction_factor gives a width of {width}",
            field="reduction_factor",
        )


def _check_pieces(config: Config, keys: Keys, stem: str, width: int) -> None:
    """A Compacter's pieces and width must be what the config gives."""
    last = "_right" if config["factorized_phm_W"] else ""
    own = f"{stem}.adapter_down.{1 if config['ln_before'] else 0}.W{last}"
    path = f"shared_parameters.{keys.name}.W_down{last}" if config["shared_W_phm"] else own
    shape, pieces = keys.shape(path), positive(config, "phm_dim")
    if len(shape) != 3 or shape[0] != pieces or shape[0] * shape[2] != width:
        raise InvalidDelta(
            f"{shown(keys.key(path))} has shape {list(shape)}, but phm_dim {pieces} and reduction_factor give "
            f"[{pieces}, n, {width / pieces:g}]",
            field="reduction_factor" if shape[:1] == (pieces,) else "phm_dim",
        )


def _invertible(found: Read, keys: Keys) -> PlannedComponent:
    """The coupling block on the embeddings."""
    if found.config["inv_adapter"] != "nice":
        raise UnsupportedDelta(
            "inv_adapter 'glow' fails in the library: it slices the sequence where it means the features",
            field="inv_adapter",
        )
    places_of = {"bart": "encoder.embed.norm", "llama": "embed", "t5": "encoder.embed", "gpt2": None}
    site = places_of.get(keys.spec.family, "embed.norm")
    if site is None:
        raise UnsupportedDelta(
            "an invertible adapter changes the sum of token and position embeddings, which no module of GPT-2 makes",
            field="inv_adapter",
        )
    stem = f"{'encoder.' if keys.spec.kind == 'encoder-decoder' else ''}invertible_adapters.{keys.name}"
    sources: dict[str, Source] = {}
    for half in ("F", "G"):
        for ours, number_ in (("down", 0), ("up", 2)):
            for bias, theirs in (("", "weight"), ("_bias", "bias")):
                sources[f"{site}/{half.lower()}_{ours}{bias}"] = keys.key(f"{stem}.{half}.{number_}.{theirs}")
    return PlannedComponent("invertible", {"activation": found.canonical["activation"]}, sources)
