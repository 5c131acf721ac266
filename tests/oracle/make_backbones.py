"""Makes the tiny random backbones that every oracle shares: ``fixtures/backbones/<family>/``.

The same weights are loaded by PEFT beside our transformers, by AdapterHub's library and by OpenDelta in virtualenvs of
their own, so that one table of results covers all three. Run it only to change them, then make every fixture again:

    python -m tests.oracle.make_backbones
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    DistilBertConfig,
    DistilBertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    ModernBertConfig,
    ModernBertForMaskedLM,
    PreTrainedModel,
    RobertaConfig,
    RobertaForMaskedLM,
    T5Config,
    T5ForConditionalGeneration,
)

FOLDER = Path(__file__).parent / "fixtures" / "backbones"
VOCAB, HIDDEN, INNER, LAYERS, HEADS, POSITIONS = 61, 32, 48, 2, 4, 48

_ENCODER = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "max_position_embeddings": POSITIONS,
    "initializer_range": 0.3,
}


def _models() -> Mapping[str, PreTrainedModel]:
    t5 = {
        "vocab_size": VOCAB,
        "d_model": HIDDEN,
        "d_kv": 8,
        "d_ff": INNER,
        "num_layers": LAYERS,
        "num_decoder_layers": LAYERS,
        "num_heads": HEADS,
        "decoder_start_token_id": 0,
    }
    return {
        "llama": LlamaForCausalLM(LlamaConfig(**_ENCODER, num_key_value_heads=2, tie_word_embeddings=True)),
        "gpt2": GPT2LMHeadModel(
            GPT2Config(
                vocab_size=VOCAB,
                n_embd=HIDDEN,
                n_inner=INNER,
                n_layer=LAYERS,
                n_head=HEADS,
                n_positions=POSITIONS,
                initializer_range=0.3,
                bos_token_id=1,
                eos_token_id=2,
            )
        ),
        "bert": BertForMaskedLM(BertConfig(**_ENCODER)),
        "roberta": RobertaForMaskedLM(RobertaConfig(**_ENCODER, type_vocab_size=1, pad_token_id=1)),
        "t5": T5ForConditionalGeneration(T5Config(**t5)),
        "t5_gated": T5ForConditionalGeneration(
            T5Config(**t5, feed_forward_proj="gated-gelu", tie_word_embeddings=False)
        ),
    }


def _more_encoders() -> Mapping[str, PreTrainedModel]:
    return {
        "distilbert": DistilBertForMaskedLM(
            DistilBertConfig(
                vocab_size=VOCAB,
                dim=HIDDEN,
                hidden_dim=INNER,
                n_layers=LAYERS,
                n_heads=HEADS,
                max_position_embeddings=POSITIONS,
                initializer_range=0.3,
            )
        ),
        # the second and third layer attend to four tokens on either side, the first and the last to all
        "modernbert": ModernBertForMaskedLM(
            ModernBertConfig(
                **_ENCODER | {"num_hidden_layers": 4, "initializer_range": 0.2},
                local_attention=8,
                classifier_pooling="mean",
                pad_token_id=0,
                bos_token_id=1,
                eos_token_id=2,
                cls_token_id=1,
                sep_token_id=2,
            )
        ),
    }


def _bart() -> Mapping[str, PreTrainedModel]:
    sides = {
        f"{stack}_{size}": number
        for stack in ("encoder", "decoder")
        for size, number in (("layers", LAYERS), ("ffn_dim", INNER), ("attention_heads", HEADS))
    }
    config = BartConfig(
        **sides,
        vocab_size=VOCAB,
        d_model=HIDDEN,
        max_position_embeddings=POSITIONS,
        init_std=0.3,
        scale_embedding=True,
        decoder_start_token_id=2,
        forced_eos_token_id=None,
    )
    model = BartForConditionalGeneration(config)
    model.final_logits_bias.normal_(0, 0.2)
    return {"bart": model}


def main() -> None:
    torch.manual_seed(11)
    for models in (
        _models,
        _more_encoders,
        _bart,
    ):  # one after the other: those that came first stay as they were
        for name, model in models().items():
            _draw_vectors(model)
            model.save_pretrained(FOLDER / name)


def _draw_vectors(model: PreTrainedModel) -> None:
    """Norms and biases: not the ones and zeros that would hide a mistake."""
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            offset = 1.0 if "norm" in name.lower() or ".ln_" in name else 0.0
            parameter.data.normal_(0, 0.2)
            if name.endswith("weight"):
                parameter.data.add_(offset)


if __name__ == "__main__":
    main()
