"""The backbone's modules as OpenDelta sees them: what each reads, where its output goes, its common name.

OpenDelta wraps any module by its path, containers included, and by *common names* that its tables give the parts of
some architectures (``attn@.q@``). These are the modules whose place in our vocabulary of sites is known.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from deltas.patches import BlockInput
from deltas.sites import BackboneSpec, SiteKind


@dataclass(frozen=True, slots=True)
class Reach:
    """A site, and what a bottleneck there reads to see what the module gives (or is given)."""

    site: str
    reads: BlockInput


@dataclass(frozen=True, slots=True)
class Module:
    """One module. ``common`` is its full common name, ``output``/``input`` are None where no site reaches them.

    ``kv`` is the site of the keys and values that a prefix on this module extends, or empty.
    """

    path: str
    common: str
    output: Reach | None = None
    input: Reach | None = None
    kv: str = ""


# One line a module of a layer, in torch's order: path below the layer, common name below the layer's, site of its
# output, sublayer whose input it reads, "kv" if a prefix may be put there. A plus means that the residual stream is
# meant: what a pre-norm sublayer leaves in it, or what it takes from it before the norm.
_Line = tuple[str, str, str, str] | tuple[str, str, str, str, str]

_BERT: tuple[_Line, ...] = (
    ("", "", "mlp.norm", "+attn"),
    ("attention", "attn@", "attn.norm", "+attn", "kv"),
    ("attention.self", "attn@.self", "", "+attn"),
    ("attention.self.query", "attn@.q@", "attn.q", "+attn"),
    ("attention.self.key", "attn@.k@", "attn.k", "+attn"),
    ("attention.self.value", "attn@.v@", "attn.v", "+attn"),
    ("attention.output", "attn@.output", "attn.norm", ""),
    ("attention.output.dense", "attn@.proj@", "attn.out", ""),
    ("attention.output.LayerNorm", "attn@.layer_norm@", "attn.norm", ""),
    ("intermediate", "ff@", "", "+mlp"),
    ("intermediate.dense", "ff@.w1@", "mlp.up", "+mlp"),
    ("output", "ff@", "mlp.norm", ""),
    ("output.dense", "ff@.w2@", "mlp.out", ""),
    ("output.LayerNorm", "ff@.layer_norm@", "mlp.norm", ""),
)
# Without a table there: no common names. Its attention is called by keyword, so a parallel adapter cannot read there.
_DISTILBERT: tuple[_Line, ...] = (
    ("", "", "mlp.norm", "+attn"),
    ("attention", "", "attn.out", ""),
    ("attention.q_lin", "", "attn.q", "+attn"),
    ("attention.k_lin", "", "attn.k", "+attn"),
    ("attention.v_lin", "", "attn.v", "+attn"),
    ("attention.out_lin", "", "attn.out", ""),
    ("sa_layer_norm", "", "attn.norm", ""),
    ("ffn", "", "mlp.out", "+mlp"),
    ("ffn.lin1", "", "mlp.up", "+mlp"),
    ("ffn.lin2", "", "mlp.out", ""),
    ("output_layer_norm", "", "mlp.norm", ""),
)
_GPT2: tuple[_Line, ...] = (
    ("", "", "+mlp.out", "+attn"),
    ("ln_1", "attn@.layer_norm@", "attn.norm", "+attn"),
    ("attn", "attn@", "attn.out", "attn", "kv"),
    ("attn.c_attn", "attn@.q,k,v@", "attn.qkv", "attn"),
    ("attn.c_proj", "attn@.proj@", "attn.out", ""),
    ("ln_2", "ff@.layer_norm@", "mlp.norm", "+mlp"),
    ("mlp", "ff@", "mlp.out", "mlp"),
    ("mlp.c_fc", "ff@.w1@", "mlp.up", "mlp"),
    ("mlp.c_proj", "ff@.w2@", "mlp.out", ""),
)
# As little of a table.
_LLAMA: tuple[_Line, ...] = (
    ("", "", "+mlp.out", "+attn"),
    ("self_attn", "", "attn.out", ""),
    ("self_attn.q_proj", "", "attn.q", "attn"),
    ("self_attn.k_proj", "", "attn.k", "attn"),
    ("self_attn.v_proj", "", "attn.v", "attn"),
    ("self_attn.o_proj", "", "attn.out", ""),
    ("mlp", "", "mlp.out", "mlp"),
    ("mlp.gate_proj", "", "mlp.gate", "mlp"),
    ("mlp.up_proj", "", "mlp.up", "mlp"),
    ("mlp.down_proj", "", "mlp.out", ""),
    ("input_layernorm", "", "attn.norm", "+attn"),
    ("post_attention_layernorm", "", "mlp.norm", "+mlp"),
)


def _t5(decoder: bool) -> Iterator[_Line]:
    yield "", "", "+mlp.out", "+attn"
    yield from _t5_attention("layer.0", "SelfAttention", "attn", "attn@", "attn")
    if decoder:
        yield from _t5_attention("layer.1", "EncDecAttention", "cross", "crossattn@", "")
    path = "layer.2" if decoder else "layer.1"
    dense = f"{path}.DenseReluDense"
    yield path, "ff@", "+mlp.out", "+mlp"
    yield dense, "ff@.DenseReluDense", "mlp.out", "mlp"
    yield f"{dense}.wi", "ff@.w1@", "mlp.up", "mlp"
    yield f"{dense}.wi_0", "ff@.DenseReluDense.wi_0", "mlp.gate", "mlp"
    yield f"{dense}.wi_1", "ff@.DenseReluDense.wi_1", "mlp.up", "mlp"
    yield f"{dense}.wo", "ff@.w2@", "mlp.out", ""
    yield f"{path}.layer_norm", "ff@.layer_norm@", "mlp.norm", "+mlp"


def _t5_attention(path: str, module: str, name: str, common: str, keys: str) -> Iterator[_Line]:
    """``keys`` is the sublayer whose input the keys and values read; cross-attention's read the encoder's output."""
    inside = f"{path}.{module}"
    yield path, common, f"+{name}.out", f"+{name}", "kv" if keys else ""
    yield inside, f"{common}.{module}", f"{name}.out", name, "kv" if keys else ""
    yield f"{inside}.q", f"{common}.q@", f"{name}.q", name
    yield f"{inside}.k", f"{common}.k@", f"{name}.k", keys
    yield f"{inside}.v", f"{common}.v@", f"{name}.v", keys
    yield f"{inside}.o", f"{common}.proj@", f"{name}.out", ""
    yield f"{path}.layer_norm", f"{common}.layer_norm@", f"{name}.norm", f"+{name}"


def _bart(decoder: bool) -> Iterator[_Line]:
    """Without a table there: no common names. Attentions are called by keyword: a parallel adapter cannot read there."""
    yield "", "", "mlp.norm", "+attn"
    yield from _bart_attention("self_attn", "attn", "+attn")
    if decoder:
        yield from _bart_attention("encoder_attn", "cross", "")
    yield "fc1", "", "mlp.up", "+mlp"
    yield "fc2", "", "mlp.out", ""
    yield "final_layer_norm", "", "mlp.norm", ""


def _bart_attention(path: str, name: str, keys: str) -> Iterator[_Line]:
    """``keys`` as for T5."""
    yield path, "", f"{name}.out", "", "kv" if keys else ""
    yield f"{path}.k_proj", "", f"{name}.k", keys
    yield f"{path}.v_proj", "", f"{name}.v", keys
    yield f"{path}.q_proj", "", f"{name}.q", f"+{name}"
    yield f"{path}.out_proj", "", f"{name}.out", ""
    yield f"{path}_layer_norm", "", f"{name}.norm", ""


@dataclass(frozen=True, slots=True)
class _Stack:
    """Where layers are: their path and common name, a number to follow, and their modules."""

    path: str
    common: str
    lines: tuple[_Line, ...]


_STACKS: Mapping[str, Mapping[str, _Stack]] = {
    "bert": {"layers.": _Stack("bert.encoder.layer", "bert.encoder@.block@", _BERT)},
    "roberta": {"layers.": _Stack("roberta.encoder.layer", "roberta.encoder@.block@", _BERT)},
    "distilbert": {"layers.": _Stack("distilbert.transformer.layer", "", _DISTILBERT)},
    "gpt2": {"layers.": _Stack("transformer.h", "transformer.decoder@.block@", _GPT2)},
    "llama": {"layers.": _Stack("model.layers", "", _LLAMA)},
    "bart": {
        "encoder.layers.": _Stack("model.encoder.layers", "", tuple(_bart(decoder=False))),
        "decoder.layers.": _Stack("model.decoder.layers", "", tuple(_bart(decoder=True))),
    },
    "t5": {
        "encoder.layers.": _Stack("encoder.block", "encoder@.block@", tuple(_t5(decoder=False))),
        "decoder.layers.": _Stack("decoder.block", "decoder@.block@", tuple(_t5(decoder=True))),
    },
}
# Common names outside the layers, where they are not the paths themselves.
_COMMON = {
    "transformer.ln_f": "transformer.decoder@.layer_norm@",
    "encoder.final_layer_norm": "encoder@.layer_norm@",
    "decoder.final_layer_norm": "decoder@.layer_norm@",
}
_ENDS = ".attn.kv"  # every layer has this site

TABLED = frozenset(_STACKS) - {"bart", "distilbert", "llama"}
"""The families that OpenDelta has common names for."""


def modules(spec: BackboneSpec) -> dict[str, Module]:
    """Path -> module, layer by layer in torch's order, then what is outside the layers. Empty for other families."""
    found: dict[str, Module] = {}
    for start, stack in _STACKS.get(spec.family, {}).items():
        for kv in spec.of_kind(SiteKind.KV):
            if not kv.name.startswith(start) or not kv.name.endswith(_ENDS):
                continue
            number = kv.name.removeprefix(start).removesuffix(_ENDS)
            for line in stack.lines:
                module = _module(line, stack, number, f"{start}{number}.", spec)
                if module is not None:
                    found[module.path] = module
    for path, site in spec.by_path.items():
        if path not in found and site.kind in (SiteKind.LINEAR, SiteKind.NORM):
            found[path] = Module(path, _COMMON.get(path, path), Reach(site.name, BlockInput.OUTPUT))
    return found


def _module(line: _Line, stack: _Stack, number: str, name: str, spec: BackboneSpec) -> Module | None:
    """None for what this backbone lacks (``wi`` beside ``wi_0``)."""
    path, common, output, given = line[:4]
    if output and f"{name}{output.removeprefix('+')}" not in spec.sites:
        return None
    sum_or_output = BlockInput.OUTPUT_AND_RESIDUAL if output.startswith("+") else BlockInput.OUTPUT
    residual_or_inner = BlockInput.RESIDUAL if given.startswith("+") else BlockInput.INNER
    return Module(
        path=".".join(filter(None, (stack.path, number, path))),
        common=".".join(filter(None, (stack.common, number, common))),
        output=Reach(f"{name}{output.removeprefix('+')}", sum_or_output) if output else None,
        input=Reach(f"{name}{given.removeprefix('+')}.out", residual_or_inner) if given else None,
        kv=f"{name}attn.kv" if line[4:] == ("kv",) else "",
    )
