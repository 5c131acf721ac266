"""Where AdapterHub's library puts what, by backbone family: modules by their paths in its state dict, and our sites.

Paths are without the base model's name in front, which is missing in files of models without a head. Layers of an
encoder-decoder are numbered through: the decoder's after the encoder's.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from deltas.errors import UnsupportedDelta
from deltas.sites import BackboneSpec

FAMILIES = ("bart", "bert", "distilbert", "gpt2", "llama", "roberta", "t5")

# How keys may begin before the paths below.
_PREFIXES = {
    "bart": "model.",
    "bert": "bert.",
    "distilbert": "distilbert.",
    "gpt2": "transformer.",
    "llama": "model.",
    "roberta": "roberta.",
    "t5": "transformer.",
}

# The parts of an encoder-decoder's layer: where its adapters are, and its attentions.
_ADAPTERS = {
    "bart": {
        "mh_adapter": "attention_adapters",
        "cross_adapter": "cross_attention_adapters",
        "output_adapter": "output_adapters",
    },
    "t5": {"mh_adapter": "0", "cross_adapter": "1"},
}
_ATTENTIONS = {"bart": ("self_attn", "encoder_attn"), "t5": ("0.SelfAttention", "1.EncDecAttention")}


@dataclass(frozen=True, slots=True)
class Place:
    """A module of the library's model, and the site whose computation it changes there."""

    layer: int
    module: str
    site: str


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer: its number, its module's path, its sites' name; ``part`` is the stack of an encoder-decoder."""

    index: int
    path: str
    site: str
    part: str = ""


def layers(spec: BackboneSpec) -> Iterator[Layer]:
    """All layers, in the library's order."""
    if spec.kind != "encoder-decoder":
        paths = {"distilbert": "transformer.layer", "gpt2": "h", "llama": "layers"}
        path = paths.get(spec.family, "encoder.layer")
        for i in range(spec.layers):
            yield Layer(i, f"{path}.{i}", f"layers.{i}")
        return
    index, path = 0, "block.{}.layer" if spec.family == "t5" else "layers.{}"
    for part in ("encoder", "decoder"):
        i = 0
        while f"{part}.layers.{i}.mlp.out" in spec.sites:
            yield Layer(index, f"{part}.{path.format(i)}", f"{part}.layers.{i}", part)
            index, i = index + 1, i + 1


def prefix(spec: BackboneSpec) -> str:
    """How the keys of a model with a head begin."""
    if spec.family not in _PREFIXES:
        raise UnsupportedDelta(
            f"AdapterHub's files are read for {', '.join(FAMILIES)}, not for {spec.family}",
            field="model_type",
        )
    return _PREFIXES[spec.family]


def bottlenecks(location: str, spec: BackboneSpec) -> Iterator[Place]:
    """Bottlenecks of ``mh_adapter``, ``output_adapter`` or ``cross_adapter``."""
    attention = location == "mh_adapter"
    for layer in layers(spec):
        if layer.part:
            if location == "cross_adapter" and layer.part == "encoder":
                continue
            leaf = {"mh_adapter": "attn", "cross_adapter": "cross", "output_adapter": "mlp"}[location]
            last = "2" if layer.part == "decoder" else "1"  # T5's feed-forward
            module = _ADAPTERS[spec.family].get(location, last)
            yield Place(layer.index, f"{layer.path}.{module}", f"{layer.site}.{leaf}.out")
        elif location != "cross_adapter":
            site = f"{layer.site}.{'attn' if attention else 'mlp'}.out"
            if spec.family in ("bert", "roberta"):
                yield Place(
                    layer.index, f"{layer.path}.{'attention.output' if attention else 'output'}", site
                )
            else:
                yield Place(
                    layer.index, f"{layer.path}.{'attention' if attention else 'output'}_adapters", site
                )


def attentions(spec: BackboneSpec) -> Iterator[tuple[str, Place]]:
    """Every attention, with the library's name of its kind and the KV site."""
    for layer in layers(spec):
        if layer.part:
            own, cross = (f"{layer.path}.{module}" for module in _ATTENTIONS[spec.family])
            first = "encoder_prefix" if layer.part == "encoder" else "self_prefix"
            yield first, Place(layer.index, own, f"{layer.site}.attn.kv")
            if layer.part == "decoder":
                yield "cross_prefix", Place(layer.index, cross, f"{layer.site}.cross.kv")
        else:
            names = {"distilbert": "attention", "gpt2": "attn", "llama": "self_attn"}
            name = names.get(spec.family, "attention.self")
            kind = "self" if spec.family == "distilbert" else "self_prefix"
            yield kind, Place(layer.index, f"{layer.path}.{name}", f"{layer.site}.attn.kv")


def attention_linears(matrix: str, spec: BackboneSpec) -> Iterator[Place]:
    """The linears of q, k or v; for GPT-2 the fused one, with the site of the part."""
    names = {"q": "query", "k": "key", "v": "value"}
    leaves = {"distilbert": f"{matrix}_lin", "gpt2": "c_attn", "t5": matrix}
    leaves |= dict.fromkeys(("bart", "llama"), f"{matrix}_proj")
    leaf = leaves.get(spec.family, names[matrix])
    for _, place in attentions(spec):
        yield Place(place.layer, f"{place.module}.{leaf}", place.site.removesuffix("kv") + matrix)


def feed_forward_linears(location: str, spec: BackboneSpec) -> Iterator[Place]:
    """The linears of ``intermediate_lora`` and ``output_lora``; on Llama the library has them the other way round."""
    first = location == "intermediate_lora"
    for layer in layers(spec):
        up, down = f"{layer.site}.mlp.up", f"{layer.site}.mlp.down"
        match spec.family:
            case "llama":
                module = f"{layer.path}.mlp.{'down_proj' if first else 'up_proj'}"
                yield Place(layer.index, module, down if first else up)
                continue
            case "bart":
                module = f"{layer.path}.{'fc1' if first else 'fc2'}"
            case "distilbert":
                module = f"{layer.path}.ffn.{'lin1' if first else 'lin2'}"
            case "gpt2":
                module = f"{layer.path}.mlp.{'c_fc' if first else 'c_proj'}"
            case "t5":
                dense = f"{layer.path}.{2 if layer.part == 'decoder' else 1}.DenseReluDense"
                gated = f"{layer.site}.mlp.gate" in spec.sites
                module = f"{dense}.{('wi_1' if gated else 'wi') if first else 'wo'}"
            case _:
                module = f"{layer.path}.{'intermediate.dense' if first else 'output.dense'}"
        yield Place(layer.index, module, up if first else down)
