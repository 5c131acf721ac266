"""Types that put trained tokens, or keys and values, before a row's own."""

from __future__ import annotations

from typing import Any

from deltas.errors import InvalidDelta, UnsupportedDelta
from deltas.formats.header import shown
from deltas.formats.peft.heads import head_modules
from deltas.formats.peft.keys import Keys, prompts
from deltas.formats.peft.reading import Reading
from deltas.formats.plan import one_of, printable
from deltas.formats.sources import Derived, Source
from deltas.sites import SiteKind

_KEY = "prompt_embeddings"
WITHOUT_CACHE = ("distilbert", "modernbert")
"""Families whose models take no keys and values from outside: PEFT has no prefix tuning there."""

PROMPT_KEYS: Keys = prompts(
    "prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs"
)
# What makes the embeddings was applied when PEFT saved them.
P_TUNING_KEYS: Keys = prompts(
    "encoder_reparameterization_type", "encoder_hidden_size", "encoder_num_layers", "encoder_dropout"
)
CPT_KEYS: Keys = prompts(
    "cpt_token_ids",
    "cpt_mask",
    "cpt_tokens_type_mask",
    "opt_weighted_loss_type",
    "opt_loss_decay_factor",
    "opt_projection_epsilon",
    "opt_projection_format_epsilon",
    "tokenizer_name_or_path",
)
PREFIX_KEYS: Keys = prompts("init_weights", "encoder_hidden_size", "prefix_projection")
CARTRIDGE_KEYS: Keys = prompts("num_frozen_tokens")


def prompt(reading: Reading) -> None:
    """Embeddings before the row's. T5's file has as many again for the decoder, which PEFT never uses."""
    copies = _submodules(reading)
    count = _tokens(reading, copies)
    width = reading.config.get("token_dim")
    if width is not None and width != reading.spec.hidden:
        raise InvalidDelta(
            f"token_dim is {printable(str(width))}, the backbone's hidden size is {reading.spec.hidden}",
            field="token_dim",
        )
    key = reading.claim(_KEY)
    source: Source = key if copies == 1 else Derived(key, rows=(0, count))
    reading.add("prompt", {}, {"embeddings": source})


def prefix(reading: Reading) -> None:
    """Keys and values of every layer: slots ``[2 layers, kv_heads, head_dim]`` of each token, key and value in turn.

    For T5 PEFT repeats the slots and gives decoder layer l the slots 4l and 4l + 1 of them, counted around; the encoder
    gets none. Refused for models that take no cache: PEFT's prefix changes nothing there, or is an error.
    """
    spec = reading.spec
    if spec.family in WITHOUT_CACHE:
        raise UnsupportedDelta(
            f"PEFT hands a prefix over in a cache, which {spec.family} does not take", field="peft_type"
        )
    copies = _submodules(reading)
    count = _tokens(reading, 1)
    layers = [site for site in spec.of_kind(SiteKind.KV) if ".cross." not in site.name]
    if spec.kind == "encoder-decoder":
        layers = [site for site in layers if site.name.startswith("decoder.")]
    width = spec.kv_heads * spec.head_dim
    slots = 2 * (spec.layers if copies == 2 else len(layers))
    shape = reading.shape(_KEY)
    if shape[1] != slots * width:
        raise InvalidDelta(
            f"{_KEY} has shape {list(shape)}; this backbone needs {slots} keys and values of {width}",
            field=_KEY,
        )
    key = reading.claim(_KEY)
    found: dict[str, Any] = {}
    for index, site in enumerate(layers):
        first = (2 * copies * index) % slots
        for parameter, slot in (("keys", first), ("values", first + 1)):
            columns = (slot * width, (slot + 1) * width)
            found[f"{site.name}/{parameter}"] = Derived(
                key, columns=columns, shape=(count, spec.kv_heads, spec.head_dim)
            )
    reading.add("prefix", {"shifts_positions": True}, found)


def _submodules(reading: Reading) -> int:
    """How often the file counts the prompt: twice for T5, whose encoder and decoder PEFT counts."""
    kind, task = reading.spec.kind, reading.config.get("task_type")
    fitting = {
        "decoder": ("CAUSAL_LM", "SEQ_CLS", "TOKEN_CLS"),
        "encoder": ("SEQ_CLS", "TOKEN_CLS", "FEATURE_EXTRACTION"),
        "encoder-decoder": ("SEQ_2_SEQ_LM",),
    }[kind]
    one_of(*fitting)("task_type", task)
    expected = 2 if kind == "encoder-decoder" else 1
    given = reading.config.get("num_transformer_submodules")
    one_of(*({1, expected}), None)("num_transformer_submodules", given)
    return expected if given is None else int(given)


def _tokens(reading: Reading, copies: int) -> int:
    """The number of virtual tokens, by tensor and config."""
    if _KEY not in reading.left:
        reading.refuse_left()
        raise InvalidDelta(f"{reading.file}: missing tensor: {_KEY!r}", field=_KEY)
    shape, wanted = reading.shape(_KEY), reading.config.get("num_virtual_tokens")
    if len(shape) != 2 or type(wanted) is not int or wanted < 1 or shape[0] != wanted * copies:
        raise InvalidDelta(
            f"{_KEY} has shape {list(shape)}, but num_virtual_tokens is {printable(str(wanted))}",
            field="num_virtual_tokens",
        )
    return wanted


def refuse_saved(reading: Reading) -> None:
    """PEFT never applies ``modules_to_save`` with prompts, but for a task's head."""
    names = reading.config.get("modules_to_save")
    modules = head_modules(reading.spec, reading.config.get("task_type"))
    heads = {"classifier", "score", *(path.rpartition(".")[0].rpartition(".")[2] for path in modules)} - {""}
    if names and (not isinstance(names, list) or set(map(str, names)) - heads):
        raise UnsupportedDelta(
            f"modules_to_save is {shown(names)}; with a prompt PEFT applies none but a head",
            field="modules_to_save",
        )
