"""A task head: one linear, or a dense tanh layer before it, on pooled last hidden states."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from deltas.delta import Component
from deltas.errors import InvalidDelta, UnsupportedDelta
from deltas.methods.head import KINDS, MAX_LABELS
from deltas.patches import Pooling
from deltas.sites import BackboneSpec, Site, SiteKind
from deltas.tuned.base import Trained, normal
from deltas.tuned.options import Option, count, flag, one_of, strings
from deltas.weights import SiteWeights

_DEVIATION = 0.02


class HeadTuning(Trained):
    """The head alone, or beside other methods."""

    name = "head"
    learning_rate = 1e-3
    kinds: tuple[SiteKind, ...] = ()
    where = "none: it reads the last hidden states (of an encoder-decoder: the encoder's)"
    known = (
        Option("kind", "classify", one_of(*KINDS), "the task; a job sets it to its own"),
        Option("labels", None, strings, "one for each output; null: outputs without names"),
        Option("outputs", None, count(1, MAX_LABELS), "how many; null: one for each label, one for regress"),
        Option(
            "pooling",
            None,
            one_of(*Pooling),
            "which tokens it reads; null: none (each) to tag, else last on decoders and mean on encoders",
        ),
        Option("dense", False, flag, "a hidden layer with tanh first"),
    )

    def settle(self, options: dict[str, Any], spec: BackboneSpec, /) -> None:
        kind, labels = options["kind"], options["labels"]
        if options["pooling"] is None:
            usual = Pooling.LAST if spec.kind == "decoder" else Pooling.MEAN
            options["pooling"] = str(Pooling.NONE if kind == "tag" else usual)
        if (kind == "tag") != (options["pooling"] == Pooling.NONE):
            raise InvalidDelta(
                f"pooling: to {kind} takes {'none' if kind == 'tag' else 'one'}", field="pooling"
            )
        if options["outputs"] is None:
            options["outputs"] = len(labels) if labels else 1 if kind == "regress" else None
        if options["outputs"] is None:
            raise InvalidDelta(f"labels: a head to {kind} needs labels, or outputs", field="labels")
        if labels is not None and len(labels) != options["outputs"]:
            raise InvalidDelta(f"outputs: {options['outputs']} for {len(labels)} labels", field="outputs")

    def sites(self, targets: Sequence[str] | None, _spec: BackboneSpec, /) -> list[Site]:
        if targets:
            raise InvalidDelta("a head has no targets; leave them out", field="targets")
        return []

    def start(
        self,
        options: Mapping[str, Any],
        _sites: Sequence[Site],
        weights: SiteWeights,
        rng: torch.Generator,
        /,
    ) -> dict[str, Tensor]:
        hidden = weights.spec.hidden
        widths = [hidden, options["outputs"]] if options["dense"] else [options["outputs"]]
        found: dict[str, Tensor] = {}
        for j, width in enumerate(widths):
            found[f"layers.{j}/weight"] = normal(rng, _DEVIATION, width, hidden)
            found[f"layers.{j}/bias"] = torch.zeros(width)
        return found

    def resume(self, component: Component, options: Mapping[str, Any], /) -> dict[str, Tensor]:
        found = super().resume(component, options)
        expected = Component("head", self.config(options, []), {})
        for name in ("kind", "pooling", "activations", "labels", "norm_eps"):
            if component.config.get(name) != expected.config.get(name):
                raise UnsupportedDelta(
                    f"the head of init_from has {name} {component.config.get(name)!r}, the job's "
                    f"{expected.config.get(name)!r}",
                    field=name,
                )
        return found

    def config(self, options: Mapping[str, Any], _sites: Sequence[Site], /) -> dict[str, Any]:
        return {
            "kind": options["kind"],
            "pooling": options["pooling"],
            "activations": ["tanh", "identity"] if options["dense"] else ["identity"],
            "labels": options["labels"],
        }
