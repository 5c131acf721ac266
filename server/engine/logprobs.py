"""Log-probabilities as they are reported: of the logits as the model gave them, in float32."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from server.engine.drawing import best
from server.types import TokenLogprob

LINES = 64  # logits turned to float32 at once: bounds the memory that a long prompt takes
ALTERNATIVES = (
    32  # looked at even if fewer are asked for, so that a row's answer does not depend on the batch
)


@torch.inference_mode()
def token_logprobs(logits: Tensor, tokens: Sequence[int], top: Sequence[int]) -> list[TokenLogprob]:
    """For each line of ``logits`` ``[n, vocab]`` its token's log-probability and the ``top[i]`` best."""
    entries: list[TokenLogprob] = []
    count = min(max(ALTERNATIVES, *top, 0), logits.shape[-1]) if any(top) else 0
    for start in range(0, len(tokens), LINES):
        stop = min(start + LINES, len(tokens))
        logprobs = logits[start:stop].float().log_softmax(dim=-1)
        index = torch.tensor(tokens[start:stop], device=logits.device)
        own = logprobs.gather(-1, index[:, None])[:, 0].tolist()
        alternatives: list[list[tuple[int, float]]] = [[] for _ in own]
        if count:
            values, ids = best(logprobs, count)
            lines = zip(ids.tolist(), values.tolist(), top[start:stop], strict=True)
            alternatives = [list(zip(line[:n], scores[:n], strict=True)) for line, scores, n in lines]
        for token, logprob, others in zip(tokens[start:stop], own, alternatives, strict=True):
            entries.append(TokenLogprob(token, logprob, others))
    return entries


def prompt_logprobs(logits: Tensor, targets: Sequence[int], top: int) -> list[TokenLogprob]:
    """As :func:`token_logprobs` for a stretch of a prompt: line i of ``logits`` predicts ``targets[i]``."""
    return token_logprobs(logits, targets, [top] * len(targets))
