"""What AdapterHub's ``adapters`` 1.3.0 cannot do: (case, family) -> why. ``make_adapterhub_table.py`` checks each."""

from __future__ import annotations

from collections.abc import Mapping

_GLOW = "the library fails: its coupling block slices the sequence where it means the features"
_PROMPT = "the library has no prompt tuning for this family"
_MASKLESS = "the library fails: it puts a prompt before dimensions that DistilBERT's attention mask has not"
_POST_ADD = "the library fails: without a norm after the sum it never sets the residual"
_FUSED = "the library fails: its fused q, k, v layer knows neither DoRA nor VeRA nor MTL-LoRA"
_LOST = (
    "the library does not save what the layers share: T5's keys lack the dot in front of shared_parameters that it "
    "looks for"
)
_LATE = "the library fails: DoRA's magnitudes are made for weights that are stored (out, in)"

LACKS: Mapping[tuple[str, str], str] = {
    **{("inv_glow", family): _GLOW for family in ("llama", "bert")},
    **{
        (case, family): _PROMPT
        for case in ("prompt", "prompt_after_bos")
        for family in ("llama", "gpt2", "bart", "t5")
    },
    **{(case, "distilbert"): _MASKLESS for case in ("prompt", "prompt_after_bos")},
    ("residual_post_add", "llama"): _POST_ADD,
    **{(case, "gpt2"): _FUSED for case in ("mtl_lora", "dora", "vera")},
    ("dora_mlp", "gpt2"): _LATE,
    **{(case, "t5"): _LOST for case in ("compacter", "compacterplusplus", "vera")},
    (
        "vera",
        "llama",
    ): "the library fails: it shares one B, and with grouped queries q and v have different widths",
    (
        "stack_lora",
        "llama",
    ): "the library fails: it feeds v's output, narrower than its input, to the next adapter",
    ("stack_lora", "gpt2"): "the library refuses: its fused q, k, v layer takes one adapter",
}
