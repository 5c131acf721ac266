"""Why OpenDelta 0.3.2 cannot make some of the cases of ``opendelta_cases.py``; ``make_opendelta_table.py`` checks each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Arguments = Mapping[str, Any]


@dataclass(frozen=True)
class Lack:
    """Why there is no such file. ``arguments`` show it: the library must fail on them, or train nothing.

    Without arguments (``None``) there is nothing to try.
    """

    reason: str
    arguments: Arguments | None = field(default_factory=dict)


NO_TABLE = Lack("OpenDelta has no table of common names for Llama: modified_modules must be given")
NO_DISTIL_TABLE = Lack(
    "OpenDelta has no table of common names for DistilBERT: modified_modules must be given"
)
NO_BART_TABLE = Lack("OpenDelta has no table of common names for BART: modified_modules must be given")
NO_BART_HEAD = Lack("not tried: heads of encoder-decoders are not served", None)
FUSED = "GPT-2's linears are Conv1D, which has no in_features: OpenDelta puts LoRA on torch.nn.Linear only"
NO_BIAS = (
    "linears of this family have no bias, and OpenDelta fails to add one: it fills the bias before it exists"
)
NO_PREFIX = Lack("OpenDelta has no prefix layer for Llama's attention", {"modified_modules": ["self_attn"]})
NO_DISTIL_PREFIX = Lack(
    "OpenDelta's prefix layer for DistilBERT fails: it calls its own insertion by arguments that it does not have",
    {"modified_modules": ["attention"]},
)
NO_CLASSIFIER = Lack("transformers 4.31 has no T5 with such a head", None)
AS_T5 = Lack("the same modules as in a T5 that is not gated", None)
