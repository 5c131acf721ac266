"""Prompt tuning (Lester et al. 2021) and prefix tuning (Li & Liang 2021)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from deltas.delta import Component
from deltas.errors import InvalidDelta, UnsupportedDelta
from deltas.methods import METHODS
from deltas.patches import Patch
from deltas.sites import BackboneSpec, Site, SiteKind
from deltas.tunable import Parameters
from deltas.tuned.base import Trained, normal, require
from deltas.tuned.options import Option, count, flag, one_of, text, token_ids
from deltas.tuned.targets import leaves
from deltas.weights import SiteWeights


class PromptTuning(Trained):
    """Embeddings before a row's own tokens. Begins with the embeddings of tokens (as in the paper, of some drawn from the
    vocabulary, or of a given text, repeated or cut to the length), or with normal numbers of the table's deviation."""

    name = "prompt"
    learning_rate = 5e-2
    kinds = (SiteKind.EMBEDDING,)
    where = "the token embedding (of an encoder-decoder: the encoder's)"
    known = (
        Option("length", 20, count(1, 4096), "how many virtual tokens"),
        Option("init", "vocabulary", one_of("vocabulary", "text", "random"), "what it begins with"),
        Option("init_text", None, text, "the text, for init text; repeated or cut to the length"),
        Option("init_tokens", None, token_ids, "the text's token ids, in place of init_text"),
    )

    def settle(self, options: dict[str, Any], spec: BackboneSpec, /) -> None:
        tokens = options["init_tokens"]
        if options["init_text"] is not None:
            raise InvalidDelta("init_text has to be tokenized first: see with_init_tokens", field="init_text")
        if (tokens is not None) != (options["init"] == "text"):
            raise InvalidDelta(
                "init text needs init_text or init_tokens, and they go with nothing else", field="init"
            )
        if tokens is not None and max(tokens) >= spec.vocab:
            raise InvalidDelta(f"init_tokens: this backbone has {spec.vocab} tokens", field="init_tokens")
        check_length(options["length"], spec)

    def usual(self, spec: BackboneSpec, /) -> list[Site]:
        return [spec.sites["encoder.embed" if spec.kind == "encoder-decoder" else "embed"]]

    def sites(self, targets: Sequence[str] | None, spec: BackboneSpec, /) -> list[Site]:
        usual, found = self.usual(spec), super().sites(targets, spec)
        if found != usual:
            raise InvalidDelta(f"a prompt goes before {usual[0].name}; leave targets out", field="targets")
        return usual

    def stored_sites(self, _component: Component, spec: BackboneSpec, /) -> list[Site]:
        return self.usual(spec)

    def start(
        self, options: Mapping[str, Any], sites: Sequence[Site], weights: SiteWeights, rng: torch.Generator, /
    ) -> dict[str, Tensor]:
        (site,), length = sites, options["length"]
        table = weights.weight(site)
        if options["init"] == "random":
            return {"embeddings": normal(rng, float(table.std()) * site.scale, length, site.out_features)}
        if options["init"] == "text":
            tokens = torch.tensor(options["init_tokens"])
            ids = tokens.repeat(-(-length // len(tokens)))[:length]
        else:
            ids = torch.randint(weights.spec.vocab, (length,), generator=rng)
        return {"embeddings": table[ids] * site.scale}

    def config(self, _options: Mapping[str, Any], _sites: Sequence[Site], /) -> dict[str, Any]:
        return {}

    def resume(self, component: Component, options: Mapping[str, Any], /) -> dict[str, Tensor]:
        found = super().resume(component, options)
        if component.config.get("after_norm"):
            raise UnsupportedDelta(
                "a prompt after the embedding norm cannot be trained on", field="init_from"
            )
        return found


class PrefixTuning(Trained):
    """Keys and values before those of a row's own tokens, of each layer: trained as they are, or made by a perceptron
    that is folded into them when it is stored. Begins at small normal numbers."""

    name = "prefix"
    learning_rate = 5e-2
    kinds = (SiteKind.KV,)
    where = "the self-attention of every layer"
    known = (
        Option("length", 20, count(1, 4096), "how many virtual tokens"),
        Option(
            "reparametrise", False, flag, "make keys and values of embeddings by a perceptron that is folded"
        ),
        Option("width", None, count(1, 65_536), "the perceptron's width; null: the hidden size"),
        Option("shifts_positions", False, flag, "whether a row's own positions begin behind the prefix"),
    )

    def settle(self, options: dict[str, Any], spec: BackboneSpec, /) -> None:
        if options["width"] is None:
            options["width"] = spec.hidden
        check_length(options["length"], spec)

    def usual(self, spec: BackboneSpec, /) -> list[Site]:
        return leaves(spec, "attn.kv")

    def start(
        self, options: Mapping[str, Any], sites: Sequence[Site], weights: SiteWeights, rng: torch.Generator, /
    ) -> dict[str, Tensor]:
        spec, length, width = weights.spec, options["length"], options["width"]
        shape = (length, spec.kv_heads, spec.head_dim)
        if not options["reparametrise"]:
            return {
                f"{site.name}/{name}": normal(rng, _DEVIATION, *shape)
                for site in sites
                for name in ("keys", "values")
            }
        found = {
            "embeddings": normal(rng, 1.0, length, width),
            "inner": normal(rng, width**-0.5, width, width),
            "inner_bias": torch.zeros(width),
        }
        for site in sites:
            found[f"{site.name}/outer"] = normal(
                rng, _DEVIATION * width**-0.5, 2 * shape[1] * shape[2], width
            )
            found[f"{site.name}/outer_bias"] = torch.zeros(2 * shape[1] * shape[2])
        return found

    def resume(self, component: Component, options: Mapping[str, Any], /) -> dict[str, Tensor]:
        if options["reparametrise"]:
            raise UnsupportedDelta(
                "the perceptron behind a stored prefix is gone: train on with reparametrise false",
                field="reparametrise",
            )
        self.check_stored(component)
        require(options, component, "shifts_positions")
        return super().resume(component, options)

    def config(self, options: Mapping[str, Any], _sites: Sequence[Site], /) -> dict[str, Any]:
        return {"shifts_positions": options["shifts_positions"]}

    def patches(
        self,
        parameters: Parameters,
        options: Mapping[str, Any],
        sites: Sequence[Site],
        weights: SiteWeights,
        _rng: torch.Generator | None,
        /,
    ) -> list[Patch]:
        folded = _folded(parameters, sites, weights.spec) if options["reparametrise"] else parameters
        return METHODS["prefix"].lower(self.form(folded, options, sites), weights)

    def component(
        self,
        parameters: Parameters,
        options: Mapping[str, Any],
        sites: Sequence[Site],
        weights: SiteWeights,
        /,
    ) -> Component:
        with torch.no_grad():
            folded = _folded(parameters, sites, weights.spec) if options["reparametrise"] else parameters
        return super().component(folded, options, sites, weights)


def with_init_tokens(given: Mapping[str, Any], tokenize: Callable[[str], list[int]]) -> Mapping[str, Any]:
    """A prompt's options as they are given, with ``init_tokens`` for an ``init_text``, which makes ``init`` text.

    Raises :class:`~deltas.errors.InvalidDelta` whose ``field`` is the option, and what ``tokenize`` raises.
    """
    if given.get("init_text") is None:
        return given
    if given.get("init_tokens") is not None:
        raise InvalidDelta("init_text and init_tokens say the same thing: give one", field="init_text")
    if given.get("init", "text") != "text":
        raise InvalidDelta(f"init_text goes with init text, not {ascii(given['init'])[:100]}", field="init")
    tokens = tokenize(text(given["init_text"], "init_text"))
    if not tokens:
        raise InvalidDelta("init_text has no tokens", field="init_text")
    return {**given, "init": "text", "init_text": None, "init_tokens": tokens}


_DEVIATION = 0.02


def _folded(parameters: Parameters, sites: Sequence[Site], spec: BackboneSpec) -> dict[str, Tensor]:
    """What the perceptron makes of the embeddings: keys and values ``[n, kv_heads, head_dim]`` by site."""
    inner = torch.tanh(F.linear(parameters["embeddings"], parameters["inner"], parameters["inner_bias"]))
    found: dict[str, Tensor] = {}
    for site in sites:
        both = F.linear(inner, parameters[f"{site.name}/outer"], parameters[f"{site.name}/outer_bias"])
        keys, values = both.view(len(both), 2, spec.kv_heads, spec.head_dim).unbind(1)
        found |= {f"{site.name}/keys": keys, f"{site.name}/values": values}
    return found


def check_length(length: int, spec: BackboneSpec) -> None:
    """Refuse virtual tokens that leave no room."""
    if length >= spec.max_positions:
        raise InvalidDelta(
            f"length: {length} virtual tokens leave no room in a context of {spec.max_positions}",
            field="length",
        )
