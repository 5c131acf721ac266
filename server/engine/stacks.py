"""What an encoder-decoder's two stacks must offer to be run on packed tokens; each family has a driver."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

from torch import Tensor

from deltas.sites import BackboneSpec, SiteKind
from server.engine.backbone import Backbone
from server.engine.bart import BartStacks
from server.engine.packed import Attend, AttendBothWays, Cross
from server.engine.t5 import T5Stacks
from server.engine.t5_bias import RelativeBias


class Stacks(Protocol):
    """An encoder and a decoder on packed tokens, ``[tokens, hidden]``, for the runner to drive.

    ``positions`` int64 ``[tokens]`` count each row's tokens from 0, a prompt's and what a prefix shifts the decoder's by
    among them; the attribute of that name is how many there are, None where a row may be of any length.
    """

    @property
    def positions(self) -> int | None: ...

    @property
    def encoder_bias(self) -> RelativeBias | None: ...

    @property
    def decoder_bias(self) -> RelativeBias | None: ...

    def embed(self, ids: Tensor) -> Tensor: ...

    def encode(self, embedded: Tensor, positions: Tensor, attention: AttendBothWays) -> Tensor: ...

    def cross(self, layer: int, encoded: Tensor) -> tuple[Tensor, Tensor]: ...

    def decode(self, ids: Tensor, positions: Tensor, attention: Sequence[Attend], cross: Cross) -> Tensor: ...


def stacks_of(backbone: Backbone) -> Stacks:
    """The driver of a loaded model."""
    match backbone.spec.family:
        case "t5":
            return T5Stacks(backbone.model)
        case "bart":
            return BartStacks(backbone.model)
        case family:
            raise LookupError(f"no driver for encoder-decoders of the family {family!r}")


def decoder_of(spec: BackboneSpec) -> BackboneSpec:
    """The spec with the decoder's number of layers: an encoder-decoder's counts the encoder's."""
    own = [site for site in spec.of_kind(SiteKind.KV) if site.name.endswith(".attn.kv")]
    return replace(spec, layers=sum(site.name.startswith("decoder.") for site in own))
