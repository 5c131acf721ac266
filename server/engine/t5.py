"""T5's stacks, driven layer by layer: the leaves are Hugging Face's own modules with their hooks, attention is ours.

Hugging Face's stacks would compute cross-attention's keys and values again in each step, or keep them in a cache of one
length for all rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from server.engine.packed import Attend, AttendBothWays, Cross
from server.engine.t5_bias import RelativeBias

SCALE = 1.0  # T5 does not scale its scores


class T5Stacks:
    """A ``T5ForConditionalGeneration`` on packed tokens. See :class:`~server.engine.stacks.Stacks`."""

    positions: int | None = None

    def __init__(self, model: Any) -> None:
        self._encoder, self._decoder = model.encoder, model.decoder
        self._head_dim = int(model.config.d_kv)
        self.encoder_bias = RelativeBias(model.encoder.block[0].layer[0].SelfAttention)
        self.decoder_bias = RelativeBias(model.decoder.block[0].layer[0].SelfAttention)

    def embed(self, ids: Tensor) -> Tensor:
        """The source's token embeddings ``[tokens, hidden]``."""
        embedded: Tensor = self._encoder.embed_tokens(ids)
        return embedded

    def encode(self, embedded: Tensor, _positions: Tensor, attention: AttendBothWays) -> Tensor:
        """The encoder's last hidden states ``[tokens, hidden]``."""
        hidden = embedded
        for block in self._encoder.block:
            own, feed_forward = block.layer
            x = own.layer_norm(hidden)
            attention.entered = x
            module = own.SelfAttention
            q, k, v = self._heads(x, module.q, module.k, module.v)
            found = attention(module, q, k, v, SCALE)
            hidden = hidden + module.o(found.flatten(1))
            hidden = hidden + feed_forward.DenseReluDense(feed_forward.layer_norm(hidden))
        last: Tensor = self._encoder.final_layer_norm(hidden)
        return last

    def cross(self, layer: int, encoded: Tensor) -> tuple[Tensor, Tensor]:
        """One decoder layer's keys and values of the encoder's output, each ``[tokens, heads, head_dim]``."""
        module = self._decoder.block[layer].layer[1].EncDecAttention
        k, v = self._heads(encoded, module.k, module.v)
        return k, v

    def decode(self, ids: Tensor, _positions: Tensor, attention: Sequence[Attend], cross: Cross) -> Tensor:
        """The decoder's last hidden states ``[tokens, hidden]``; ``attention`` by layer."""
        hidden: Tensor = self._decoder.embed_tokens(ids)
        for index, block in enumerate(self._decoder.block):
            own, other, feed_forward = block.layer
            x = own.layer_norm(hidden)
            module = own.SelfAttention
            q, k, v = self._heads(x, module.q, module.k, module.v)
            found = attention[index](index, q, k, v, SCALE)
            hidden = hidden + module.o(found.flatten(1))
            module = other.EncDecAttention
            (q,) = self._heads(other.layer_norm(hidden), module.q)
            hidden = hidden + module.o(cross(index, q, SCALE).flatten(1))
            hidden = hidden + feed_forward.DenseReluDense(feed_forward.layer_norm(hidden))
        last: Tensor = self._decoder.final_layer_norm(hidden)
        return last

    def _heads(self, x: Tensor, *linears: Any) -> list[Tensor]:
        """What these linears make of ``x`` ``[tokens, hidden]``, by head: ``[tokens, heads, head_dim]``."""
        return [linear(x).unflatten(1, (-1, self._head_dim)) for linear in linears]
