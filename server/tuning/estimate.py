"""How long a job will take, roughly: said before it is queued."""

from __future__ import annotations

from typing import Literal

# Arithmetic a second that training reaches, where nothing was measured yet: on a CPU, of two cores with bfloat16 (8 rows of
# 128 tokens of a 135 M decoder in some 4 s); on a GPU, a guess for small batches.
STATED = {"cpu": 1.5e11, "cuda": 2e13}
# Operations a token and parameter: two forward, two for the gradients of activations, none for those of weights.
_PASSES = 4


def seconds(
    tokens: int, parameters: int, device: Literal["cpu", "cuda"], tokens_per_second: float | None = None
) -> float:
    """For ``tokens`` of all epochs through a backbone of ``parameters``: by what was measured, else by a stated rate."""
    rate = tokens_per_second or STATED[device] / (_PASSES * parameters)
    return tokens / rate
