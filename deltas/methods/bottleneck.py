"""Bottleneck adapters: ``h += s (U f(D z + d) + u)`` at block sites, ``z`` chosen by ``reads``.

Canonical tensors ``<site>/down`` ``[m, hidden]``, ``<site>/down_bias`` ``[m]``, ``<site>/up``
``[hidden, m]``, ``<site>/up_bias`` ``[hidden]``; config ``{"activation", "reads", "scale"}``.

Options (AdapterHub's; see :class:`~deltas.patches.Bottleneck`): ``<site>/scaling`` ``[1]`` or ``[hidden]``, a trained
scale; ``<site>/norm_before``, ``<site>/norm_before_bias`` ``[hidden]`` and ``norm_after`` likewise, layer norms;
``<site>/gate`` ``[1, hidden]``, ``<site>/gate_bias`` ``[1]``. Config ``"onto"``: what is added to, where it is not
the sublayer's output; ``"norm_around": true``: ``norm_after`` is applied to the sum. On post-norm backbones a
bottleneck may also be at the norm after a block, reading the norm's output. (Houlsby et al. 2019, Pfeiffer et al.
2020, He et al. 2022.)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from deltas.errors import InvalidDelta
from deltas.methods import gates
from deltas.methods.base import Outline, number, only_keys
from deltas.methods.per_site import Loaded, Outlined, PerSite, truth
from deltas.patches import Activation, Affine, BlockInput, Bottleneck, Patch
from deltas.sites import BackboneSpec, SiteKind

ACTIVATIONS = {activation.name.lower(): activation for activation in Activation}
READS = {reads.value: reads for reads in BlockInput}
_PAIRS = (("norm_before", "norm_before_bias"), ("norm_after", "norm_after_bias"), gates.PARAMETERS)


class BottleneckAdapter(PerSite):
    """A two-layer perceptron beside or after a sublayer."""

    name = "bottleneck"
    kinds = (SiteKind.BLOCK, SiteKind.NORM)
    required: tuple[str, ...] = ("down", "down_bias", "up", "up_bias")
    optional: tuple[str, ...] = ("scaling", *(name for pair in _PAIRS for name in pair))

    def normalise(self, config: Mapping[str, Any]) -> dict[str, Any]:
        only_keys(config, frozenset({"activation", "reads", "scale", "onto", "norm_around"}))
        found: dict[str, Any] = {
            "activation": choice(config, "activation", ACTIVATIONS),
            "reads": choice(config, "reads", READS),
            "scale": number(config.get("scale"), "scale"),
        }
        if config.get("onto", "output") != "output":
            found["onto"] = choice(config, "onto", READS)
        if truth(config.get("norm_around", False), "norm_around"):
            found["norm_around"] = True
        return found

    def check(self, outline: Outline, spec: BackboneSpec) -> None:
        super().check(outline, spec)
        for name in outline.shapes:
            site, _, parameter = name.rpartition("/")
            if parameter == "gate":
                gates.check_gate(site, spec)
            if site and spec.sites[site].kind is SiteKind.NORM:
                own = outline.config.get("reads"), outline.config.get("onto", "output")
                follows = any(other.norm == spec.sites[site].path for other in spec.sites.values())
                if not follows or own not in (("output", "output"), ("inner", "output")):
                    raise InvalidDelta(
                        f"{name!r}: a bottleneck at a norm must follow a block, and read what the norm gives or what "
                        "the block read",
                        field=name,
                    )

    def check_site(self, here: Outlined) -> None:
        self.check_factors(here)
        hidden = here.site.out_features
        if "scaling" in here.shapes:
            here.expect("scaling", 1 if here.shapes["scaling"] == (1,) else hidden)
        for pair in _PAIRS:
            if (pair[0] in here.shapes) != (pair[1] in here.shapes):
                missing = pair[1] if pair[0] in here.shapes else pair[0]
                name = f"{here.site.name}/{missing}"
                raise InvalidDelta(f"missing tensors: {name}", field=name)
            if pair[0] in here.shapes:
                here.expect(pair[0], *((1, hidden) if pair == gates.PARAMETERS else (hidden,)))
                here.expect(pair[1], 1 if pair == gates.PARAMETERS else hidden)
        if here.config.get("norm_around") and "norm_after" not in here.shapes:
            raise InvalidDelta("norm_around needs norm_after", field="norm_around")

    def check_factors(self, here: Outlined) -> None:
        """Refuse projections that do not fit."""
        hidden = here.site.out_features
        width, _ = here.expect("down", 0, hidden)
        here.expect("down_bias", width)
        here.expect("up", hidden, width)
        here.expect("up_bias", hidden)

    def factors(self, here: Loaded) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """``down`` ``[m, hidden]``, ``down_bias``, ``up`` ``[hidden, m]``, ``up_bias``."""
        return here["down"], here["down_bias"], here["up"], here["up_bias"]

    def rank(self, outline: Outline) -> int | None:
        widths = (shape[0] for name, shape in outline.shapes.items() if name.endswith("/down"))
        return max(widths, default=None)

    def lower_site(self, here: Loaded) -> Iterable[Patch]:
        down, down_bias, up, up_bias = self.factors(here)
        trained = here.tensors.get("scaling")
        scale = here.config["scale"] if trained is None else here.config["scale"] * trained
        yield Bottleneck(
            here.site.name,
            down=down.contiguous(),
            down_bias=down_bias.contiguous(),
            up=(up.T * scale).contiguous(),
            up_bias=(up_bias * scale).contiguous(),
            activation=ACTIVATIONS[here.config["activation"]],
            reads=READS[here.config["reads"]],
            norm_before=_norm(here, "norm_before"),
            norm_after=_norm(here, "norm_after"),
            norm_around=here.config.get("norm_around", False),
            gate=gates.gate_of(here.tensors),
            onto=READS[here.config.get("onto", "output")],
        )


def choice(config: Mapping[str, Any], key: str, known: Mapping[str, object]) -> str:
    """One of the known names."""
    value = config.get(key)
    if not isinstance(value, str) or value not in known:
        raise InvalidDelta(f"{key} must be one of {', '.join(known)}", field=key)
    return value


def _norm(here: Loaded, name: str) -> Affine | None:
    return Affine(here[name], here[f"{name}_bias"]) if name in here else None
