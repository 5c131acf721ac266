"""PEFT beside us: random deltas of every kind on the tiny backbones, saved by PEFT, and PEFT's own logits for them.

Imports PEFT, torch and transformers and nothing of ours, so that agreement with it means something. ``peft_table`` has
the cases.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import peft
import torch
from peft import PeftConfig, PeftModel
from torch import Tensor, nn
from transformers import (
    BartForConditionalGeneration,
    BertForMaskedLM,
    DistilBertForMaskedLM,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    ModernBertForMaskedLM,
    PreTrainedModel,
    RobertaForMaskedLM,
    T5ForConditionalGeneration,
)

BACKBONES = Path(__file__).parent / "fixtures" / "backbones"


@dataclass(frozen=True, slots=True)
class Family:
    """An architecture and how PEFT's configs name its parts."""

    name: str
    model: type[PreTrainedModel]
    task: str | None  # PEFT's task type; None where it has none for the model (masked language models)
    linears: tuple[str, ...]  # every linear of a layer
    query_value: tuple[str, ...]
    feedforward: tuple[str, ...]  # what IA3 scales at the input, as suffixes
    embedding: str
    head: str
    head_bias: bool
    norms: tuple[str, ...]  # of a layer
    last_norm: str
    conv1d: bool = False
    spread: float = (
        0.25  # standard deviation of what is drawn; T5's unscaled attention turns noise into differences
    )


FAMILIES: Mapping[str, Family] = {
    family.name: family
    for family in (
        Family(
            name="llama",
            model=LlamaForCausalLM,
            task="CAUSAL_LM",
            linears=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
            query_value=("q_proj", "v_proj"),
            feedforward=("down_proj",),
            embedding="embed_tokens",
            head="lm_head",
            head_bias=False,
            norms=("input_layernorm", "post_attention_layernorm"),
            last_norm="model.norm",
        ),
        Family(
            name="gpt2",
            model=GPT2LMHeadModel,
            task="CAUSAL_LM",
            linears=("c_attn", "c_proj", "c_fc"),
            query_value=("c_attn",),
            feedforward=("c_proj",),
            embedding="wte",
            head="lm_head",
            head_bias=False,
            norms=("ln_1", "ln_2"),
            last_norm="ln_f",
            conv1d=True,
        ),
        Family(
            name="bert",
            model=BertForMaskedLM,
            task=None,
            linears=("query", "key", "value", "intermediate.dense", "output.dense"),
            query_value=("query", "value"),
            feedforward=("output.dense",),
            embedding="word_embeddings",
            head="cls.predictions.decoder",
            head_bias=True,
            norms=("output.LayerNorm",),
            last_norm="layer.1.output.LayerNorm",
        ),
        Family(
            name="roberta",
            model=RobertaForMaskedLM,
            task=None,
            linears=("query", "key", "value", "intermediate.dense", "output.dense"),
            query_value=("query", "value"),
            feedforward=("output.dense",),
            embedding="word_embeddings",
            head="lm_head.decoder",
            head_bias=True,
            norms=("output.LayerNorm",),
            last_norm="layer.1.output.LayerNorm",
        ),
        Family(
            name="distilbert",
            model=DistilBertForMaskedLM,
            task=None,
            linears=("q_lin", "k_lin", "v_lin", "lin1", "lin2", "out_lin"),
            query_value=("q_lin", "v_lin"),
            feedforward=("lin2",),
            embedding="word_embeddings",
            head="vocab_projector",
            head_bias=True,
            norms=("sa_layer_norm",),
            last_norm="layer.1.output_layer_norm",
        ),
        Family(
            name="modernbert",
            model=ModernBertForMaskedLM,
            task=None,
            linears=("Wqkv", "attn.Wo", "Wi", "mlp.Wo"),
            query_value=("Wqkv",),
            feedforward=("mlp.Wo",),
            embedding="tok_embeddings",
            head="decoder",
            head_bias=True,
            norms=("mlp_norm",),
            last_norm="final_norm",
            spread=0.15,
        ),
        Family(
            name="bart",
            model=BartForConditionalGeneration,
            task="SEQ_2_SEQ_LM",
            linears=("q_proj", "k_proj", "v_proj", "fc1", "fc2", "out_proj"),
            query_value=("q_proj", "v_proj"),
            feedforward=("fc2",),
            embedding="embed_tokens",
            head="lm_head",
            head_bias=False,
            norms=("self_attn_layer_norm",),
            last_norm="decoder.layers.1.final_layer_norm",
        ),
        Family(
            name="t5",
            model=T5ForConditionalGeneration,
            task="SEQ_2_SEQ_LM",
            linears=("q", "k", "v", "o", "wi", "wo"),
            query_value=("q", "v"),
            feedforward=("wo",),
            embedding="embed_tokens",
            head="lm_head",
            head_bias=False,
            norms=("layer_norm",),
            last_norm="decoder.final_layer_norm",
            spread=0.15,
        ),
    )
}

# What PEFT does not find in a configuration under the names that it knows.
PROMPT_SIZES: Mapping[str, Mapping[str, int]] = {"distilbert": {"token_dim": 32, "num_attention_heads": 4}}

Values = tuple[float, float]
"""Mean and standard deviation of a parameter's random values."""

Prepare = Callable[[PeftModel, Family], None]


@dataclass(frozen=True, slots=True)
class Case:
    """One way of using PEFT. ``make`` gives the config for a family; ``values`` says, by pattern in a parameter's name,
    how its random values are distributed where the family's spread around zero will not do; ``prepare`` runs between
    the drawing and the saving.
    """

    name: str
    kind: str  # a member of peft.PeftType
    make: Callable[[Family], PeftConfig]
    values: Mapping[str, Values] = field(default_factory=dict)
    excluded: Mapping[str, str] = field(default_factory=dict)  # family -> why there is no such cell
    prepare: Prepare | None = None
    pickled: bool = False
    dtype: torch.dtype = torch.float32  # of the saved file

    @property
    def families(self) -> tuple[str, ...]:
        return tuple(name for name in FAMILIES if name not in self.excluded)


@dataclass(frozen=True, slots=True)
class Row:
    """One unpadded sequence: token ids, and for an encoder-decoder the decoder's."""

    ids: tuple[int, ...]
    decoder_ids: tuple[int, ...] = ()


ROWS = (
    Row((5, 9, 33, 2, 17, 41, 8, 60, 12), (0, 7, 21, 3)),
    Row((11, 3, 3, 58, 29), (0, 44, 44, 5, 30, 9)),
)

# Norm-like parameters, which are one where they change nothing.
_ONES: Mapping[str, Values] = {
    r"norm.*\.weight$": (1.0, 0.2),
    r"\.ln_\w+\..*weight$": (1.0, 0.2),
    r"magnitude": (3.0, 0.5),
    r"_w_norm": (2.0, 0.3),
    r"ia3_l|boft_s|road_alpha|vector_[ab]": (1.0, 0.2),
}


@cache
def backbone_logits(family: str) -> tuple[Tensor, ...]:
    """The tiny backbone's own logits for :data:`ROWS`."""
    model = fresh_backbone(FAMILIES[family])
    return tuple(logits(model, row) for row in ROWS)


def fresh_backbone(family: Family) -> PreTrainedModel:
    """A new copy of the tiny backbone, float32, in evaluation mode."""
    model: PreTrainedModel = family.model.from_pretrained(BACKBONES / family.name, dtype=torch.float32)
    return model.eval()


def save_delta(case: Case, family: Family, folder: Path, *, seed: int = 0) -> None:
    """Wrap a fresh backbone, draw every adapter parameter at random and let PEFT save it to ``folder``."""
    torch.manual_seed(seed)
    with quiet():
        model = peft.get_peft_model(fresh_backbone(family), case.make(family))
        randomise(model, case.values, family.spread)
        if case.prepare is not None:
            case.prepare(model, family)
        if case.dtype != torch.float32:
            for parameter in _trained(model).values():
                parameter.data = parameter.data.to(case.dtype)
        model.eval()
        model.save_pretrained(folder, safe_serialization=not case.pickled)


def load_delta(family: Family, folder: Path) -> PeftModel:
    """What PEFT makes of a folder, on a fresh backbone."""
    with quiet():
        model = PeftModel.from_pretrained(fresh_backbone(family), folder)
    return model.eval()


@torch.no_grad()
def logits(model: nn.Module, row: Row) -> Tensor:
    """Float32 logits ``[length, vocab]`` at the row's own tokens (an encoder-decoder's decoder's): prompts' are cut off.

    No cache but the one that holds a prefix.
    """
    ids = torch.tensor([row.ids])
    with quiet():
        if _encoder_decoder(model):
            out = model(input_ids=ids, decoder_input_ids=torch.tensor([row.decoder_ids]), use_cache=False)
            length = len(row.decoder_ids)
        else:
            extra = {} if _masked(model) else {"use_cache": False}
            out = model(input_ids=ids, **extra)
            length = len(row.ids)
    result: Tensor = out.logits[0, -length:]
    return result.float()


def randomise(model: PeftModel, values: Mapping[str, Values], spread: float = 0.25) -> None:
    """Draw every adapter parameter, in the order of their names; those that ``values`` does not know around zero."""
    rules = {**values, **{k: v for k, v in _ONES.items() if k not in values}}
    for name, parameter in sorted(_trained(model).items()):
        mean, std = next((v for pattern, v in rules.items() if re.search(pattern, name)), (0.0, spread))
        parameter.data.normal_(mean, std)


def _trained(model: PeftModel) -> dict[str, nn.Parameter]:
    """What training would have changed, and what PEFT saves beside it though it is frozen (MiCA's B)."""
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad or re.search(r"\.(lora|vera|loha|prompt)_\w+", name)
    }


def _encoder_decoder(model: nn.Module) -> bool:
    return bool(getattr(model.config, "is_encoder_decoder", False))


def _masked(model: nn.Module) -> bool:
    return str(getattr(model.config, "model_type", "")) in ("bert", "distilbert", "modernbert", "roberta")


@contextmanager
def quiet() -> Iterator[None]:
    """PEFT warns about much that is intended here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def cells(cases: Sequence[Case]) -> list[tuple[Case, Family]]:
    """Every (case, family) that PEFT can do."""
    return [(case, FAMILIES[name]) for case in cases for name in case.families]
