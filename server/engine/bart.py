"""BART's stacks, driven layer by layer: the leaves are Hugging Face's own modules with their hooks, attention is ours.

Hugging Face's stacks count the positions of all rows from one number; here every token brings its own. In float16 theirs
also clip an encoder layer's infinities; here the row fails.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from server.engine.packed import Attend, AttendBothWays, Cross


class BartStacks:
    """A ``BartForConditionalGeneration`` on packed tokens. See :class:`~server.engine.stacks.Stacks`."""

    encoder_bias = None
    decoder_bias = None

    def __init__(self, model: Any) -> None:
        self._encoder, self._decoder = model.model.encoder, model.model.decoder
        self.positions: int | None = int(model.config.max_position_embeddings)

    def embed(self, ids: Tensor) -> Tensor:
        """The source's token embeddings ``[tokens, hidden]``, scaled."""
        embedded: Tensor = self._encoder.embed_tokens(ids)
        return embedded

    def encode(self, embedded: Tensor, positions: Tensor, attention: AttendBothWays) -> Tensor:
        """The encoder's last hidden states ``[tokens, hidden]``."""
        hidden = _placed(self._encoder, embedded, positions)
        for layer in self._encoder.layers:
            attention.entered = hidden
            module = layer.self_attn
            q, k, v = _heads(hidden, module, module.q_proj, module.k_proj, module.v_proj)
            found = attention(module, q, k, v, module.scaling)
            hidden = layer.self_attn_layer_norm(hidden + module.out_proj(found.flatten(1)))
            hidden = _feed_forward(layer, hidden)
        return hidden

    def cross(self, layer: int, encoded: Tensor) -> tuple[Tensor, Tensor]:
        """One decoder layer's keys and values of the encoder's output, each ``[tokens, heads, head_dim]``."""
        module = self._decoder.layers[layer].encoder_attn
        k, v = _heads(encoded, module, module.k_proj, module.v_proj)
        return k, v

    def decode(self, ids: Tensor, positions: Tensor, attention: Sequence[Attend], cross: Cross) -> Tensor:
        """The decoder's last hidden states ``[tokens, hidden]``; ``attention`` by layer."""
        hidden = _placed(self._decoder, self._decoder.embed_tokens(ids), positions)
        for index, layer in enumerate(self._decoder.layers):
            module = layer.self_attn
            q, k, v = _heads(hidden, module, module.q_proj, module.k_proj, module.v_proj)
            found = attention[index](index, q, k, v, module.scaling)
            hidden = layer.self_attn_layer_norm(hidden + module.out_proj(found.flatten(1)))
            module = layer.encoder_attn
            (q,) = _heads(hidden, module, module.q_proj)
            found = cross(index, q, module.scaling)
            hidden = layer.encoder_attn_layer_norm(hidden + module.out_proj(found.flatten(1)))
            hidden = _feed_forward(layer, hidden)
        return hidden


def _placed(stack: Any, embedded: Tensor, positions: Tensor) -> Tensor:
    """Embeddings ``[tokens, hidden]`` with those of their positions, normed."""
    found: Tensor = stack.embed_positions(positions, position_ids=positions)[0]
    normed: Tensor = stack.layernorm_embedding(embedded + found)
    return normed


def _feed_forward(layer: Any, hidden: Tensor) -> Tensor:
    normed: Tensor = layer.final_layer_norm(hidden + layer.fc2(layer.activation_fn(layer.fc1(hidden))))
    return normed


def _heads(x: Tensor, attention: Any, *linears: Any) -> list[Tensor]:
    """What these linears make of ``x`` ``[tokens, hidden]``, by head: ``[tokens, heads, head_dim]``."""
    return [linear(x).unflatten(1, (-1, attention.head_dim)) for linear in linears]
