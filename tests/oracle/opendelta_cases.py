"""The cases of ``make_opendelta_table.py``: one delta model each, the families that OpenDelta can make it for, and
why it cannot make it for the others. Plain data: read in OpenDelta's virtualenv only; tests read ``index.json``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

if __package__:
    from tests.oracle import opendelta_lacks as lacks
else:  # imported by path
    import opendelta_lacks as lacks  # type: ignore[import-not-found,no-redef,unused-ignore]

FAMILIES = ("llama", "gpt2", "bert", "roberta", "distilbert", "bart", "t5", "t5_gated")


@dataclass(frozen=True)
class Case:
    """One delta model: ``delta`` is OpenDelta's ``delta_type``.

    ``by_family`` is laid over ``arguments``, a ``Lack`` instead of arguments where the library cannot. ``warm`` runs
    the model once before freezing, and loads by ``load_checkpoint`` after another such run: some parameters exist
    only from the first forward pass on. ``head`` is the end of the model class's name (``ForTokenClassification``)
    where it is not the language model's.
    """

    name: str
    delta: str
    arguments: lacks.Arguments = field(default_factory=dict)
    by_family: Mapping[str, lacks.Arguments | lacks.Lack] = field(default_factory=dict)
    warm: bool = False
    head: str = ""


CASES = (
    Case(
        "lora",
        "lora",
        by_family={
            "bart": lacks.NO_BART_TABLE,
            "distilbert": lacks.NO_DISTIL_TABLE,
            "llama": lacks.NO_TABLE,
            "gpt2": lacks.Lack(
                "attn@.q@ and attn@.v@ match nothing in GPT-2, whose q, k and v are one module"
            ),
            "t5_gated": lacks.AS_T5,
        },
    ),
    Case(
        "lora_named",
        "lora",
        {"lora_r": 3, "lora_alpha": 5, "lora_dropout": 0.1},
        {
            "bart": {
                "modified_modules": [
                    "encoder_attn.q_proj",
                    "encoder_attn.v_proj",
                    "self_attn.out_proj",
                    "fc1",
                ]
            },
            "distilbert": {"modified_modules": ["q_lin", "ffn.lin1", "attention.out_lin"]},
            "llama": {"modified_modules": ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"]},
            "gpt2": lacks.Lack(lacks.FUSED, {"modified_modules": ["c_attn", "c_fc"]}),
            "bert": {"modified_modules": ["self.key", "output.dense", "intermediate.dense"]},
            "roberta": {"modified_modules": [r"[r]1\.attention\.self\.(key|value)", "intermediate.dense"]},
            "t5": {"modified_modules": ["EncDecAttention.q", "EncDecAttention.v", "SelfAttention.o", "wi"]},
            "t5_gated": {"modified_modules": ["EncDecAttention.k", "wi_0", "wi_1", "wo"]},
        },
    ),
    Case(
        "adapter",
        "adapter",
        {"bottleneck_dim": 6},
        {
            "bart": {"modified_modules": ["out_proj", "fc2"]},
            "distilbert": {"modified_modules": ["attention.out_lin", "lin2"]},
            "llama": {"modified_modules": ["o_proj", "down_proj"]},
            "t5_gated": lacks.AS_T5,
        },
    ),
    # The output of whole modules, not of a linear: after the norm in BERT, after the residual in T5.
    Case(
        "adapter_modules",
        "adapter",
        {"bottleneck_dim": 5, "non_linearity": "relu"},
        {
            "bart": {"modified_modules": ["self_attn", "encoder_attn", "encoder.layers.1"]},
            "distilbert": {"modified_modules": ["attention", "ffn"]},
            "llama": {"modified_modules": ["self_attn", "mlp"]},
            "gpt2": {"modified_modules": ["attn", "mlp"]},
            "bert": {"modified_modules": ["attention.output", "1.output"]},
            "roberta": {"modified_modules": ["attention", "layer.0"]},
            "t5": {"modified_modules": ["layer.0", "DenseReluDense"]},
            "t5_gated": {"modified_modules": ["0.layer.1", "block.1"]},
        },
    ),
    Case(
        "parallel_adapter",
        "parallel_adapter",
        {"bottleneck_dim": 6},
        {
            "bart": {"modified_modules": ["fc1", "fc2"]},
            "distilbert": {"modified_modules": ["ffn", "ffn"]},
            "llama": {"modified_modules": ["mlp", "mlp"]},
            "t5_gated": lacks.Lack(
                "ff@.w1@ is not in the table of a gated T5, so that readers and writers pair up wrongly"
            ),
        },
    ),
    Case(
        "parallel_adapter_named",
        "parallel_adapter",
        {"bottleneck_dim": 5, "non_linearity": "gelu_orig"},
        {
            "bart": {"modified_modules": ["self_attn.q_proj", "self_attn.out_proj"]},
            "distilbert": {"modified_modules": ["lin1", "lin2"]},
            "llama": {"modified_modules": ["gate_proj", "down_proj"]},
            "gpt2": {"modified_modules": ["mlp", "mlp"]},
            "bert": {"modified_modules": ["attention.self", "attention.output.dense"]},
            "roberta": {"modified_modules": ["intermediate", r"[r]layer\.\d+\.output"]},
            "t5": {"modified_modules": ["DenseReluDense", "DenseReluDense"]},
            "t5_gated": {"modified_modules": ["SelfAttention", "SelfAttention"]},
        },
    ),
    Case(
        "compacter",
        "compacter",
        {"reduction_factor": 8},
        {
            "bart": {"modified_modules": ["encoder_attn.out_proj", "1.fc2"]},
            "distilbert": {"modified_modules": ["0.ffn.lin2"]},
            "llama": {"modified_modules": ["o_proj", "down_proj"]},
            "roberta": {"modified_modules": ["0.output.dense"]},
            "t5": {"modified_modules": ["EncDecAttention.o", "1.layer.1.DenseReluDense.wo"]},
            "t5_gated": lacks.AS_T5,
        },
    ),
    Case(
        "compacter_factored_rule",
        "compacter",
        {
            "reduction_factor": 4,
            "hypercomplex_division": 2,
            "factorized_phm_rule": True,
            "phm_rank": 2,
            "kronecker_prod": True,
            "use_bias_up_sampler": False,
            "non_linearity": "swish",
        },
        {
            "bart": {"modified_modules": ["fc2"]},
            "distilbert": {"modified_modules": ["1.ffn.lin2"]},
            "llama": {"modified_modules": ["down_proj"]},
            "roberta": {"modified_modules": ["1.output.dense"]},
            "t5": {"modified_modules": ["wo"]},
            "t5_gated": lacks.AS_T5,
        },
    ),
    Case(
        "compacter_dense",
        "compacter",
        {
            "reduction_factor": 4,
            "hypercomplex_division": 2,
            "factorized_phm": False,
            "use_bias_down_sampler": False,
            "non_linearity": "tanh",
        },
        {
            "bart": {"modified_modules": ["encoder_attn.out_proj"]},
            "distilbert": {"modified_modules": ["1.attention.out_lin"]},
            "llama": {"modified_modules": ["o_proj"]},
            "roberta": {"modified_modules": ["1.attention.output.dense"]},
            "t5": {"modified_modules": ["EncDecAttention.o"]},
            "t5_gated": lacks.AS_T5,
        },
    ),
    Case(
        "low_rank_adapter",
        "low_rank_adapter",
        {"reduction_factor": 8},
        {
            "bart": {"modified_modules": ["encoder_attn.out_proj", "0.fc2"]},
            "distilbert": {"modified_modules": ["0.ffn.lin2"]},
            "llama": {"modified_modules": ["o_proj", "down_proj"]},
            "roberta": {"modified_modules": ["0.output.dense"]},
            "t5": {"modified_modules": ["EncDecAttention.o", "1.layer.1.DenseReluDense.wo"]},
            "t5_gated": lacks.AS_T5,
        },
    ),
    Case(
        "bitfit",
        "bitfit",
        by_family={
            "bart": lacks.NO_BART_TABLE,
            "distilbert": lacks.NO_DISTIL_TABLE,
            "llama": lacks.Lack(lacks.NO_BIAS, {"modified_modules": ["q_proj"]}),
            "t5": lacks.Lack(lacks.NO_BIAS),
            "t5_gated": lacks.Lack(lacks.NO_BIAS),
        },
    ),
    Case(
        "bitfit_named",
        "bitfit",
        by_family={
            "bart": {"modified_modules": ["self_attn.v_proj", "1.fc1"]},
            "distilbert": {"modified_modules": ["v_lin", "1.ffn", "vocab_transform"]},
            "llama": lacks.Lack(lacks.NO_BIAS, {"modified_modules": ["mlp"]}),
            "gpt2": {"modified_modules": ["attn", "1.mlp"]},
            "bert": {"modified_modules": ["query", "cls"]},
            "roberta": {"modified_modules": ["value", "lm_head"], "exclude_modules": ["roberta.embeddings"]},
            "t5": lacks.Lack(lacks.NO_BIAS, {"modified_modules": ["wo"]}),
            "t5_gated": lacks.Lack(lacks.NO_BIAS, {"modified_modules": ["wo"]}),
        },
    ),
    # A bias of OpenDelta's own behind a module that is neither linear nor layer norm.
    Case(
        "bitfit_added",
        "bitfit",
        {"unfrozen_modules": ["deltas", "bitfit"]},
        {
            "bart": lacks.Lack("every linear and norm of this family has a bias", None),
            "distilbert": lacks.Lack("every linear and norm of this family has a bias", None),
            "llama": {"modified_modules": ["input_layernorm", "norm"]},
            "gpt2": {"modified_modules": ["c_attn", "1.mlp.c_fc"]},  # Conv1D
            "bert": lacks.Lack("every linear and norm of this family has a bias", None),
            "roberta": lacks.Lack("every linear and norm of this family has a bias", None),
            "t5": {"modified_modules": ["layer_norm"]},
            "t5_gated": {"modified_modules": ["final_layer_norm", "1.layer_norm"]},
        },
        warm=True,
    ),
    Case("soft_prompt", "soft_prompt", {"soft_token_num": 3, "token_init": False}),
    Case(
        "prefix",
        "prefix",
        {"prefix_token_num": 3, "reparameterize": False},
        {
            "bart": {"modified_modules": ["self_attn"]},
            "distilbert": lacks.NO_DISTIL_PREFIX,
            "llama": lacks.NO_PREFIX,
            "t5_gated": lacks.AS_T5,
        },
    ),
    Case(
        "prefix_reparameterized",
        "prefix",
        {"prefix_token_num": 4, "reparameterize": True, "embed_dim": 6, "mid_dim": 7},
        {
            "bart": {"modified_modules": ["self_attn"]},
            "distilbert": lacks.NO_DISTIL_PREFIX,
            "llama": lacks.NO_PREFIX,
            "t5_gated": lacks.AS_T5,
        },
    ),
    # Not in the first layer: tells what becomes of T5's position biases before and behind it.
    Case(
        "prefix_last_layer",
        "prefix",
        {"prefix_token_num": 2, "reparameterize": False},
        {
            "bart": {"modified_modules": ["decoder.layers.1.self_attn"]},
            "distilbert": lacks.NO_DISTIL_PREFIX,
            "llama": lacks.NO_PREFIX,
            "gpt2": {"modified_modules": ["1.attn"]},
            "bert": {"modified_modules": ["1.attention"]},
            "roberta": {"modified_modules": ["1.attention"]},
            "t5": {"modified_modules": ["decoder.block.1.layer.0"]},
            "t5_gated": {"modified_modules": ["encoder.block.1.layer.0.SelfAttention"]},
        },
    ),
    # Parameters of the backbone itself, saved whole beside the delta's.
    Case(
        "adapter_and_norms",
        "adapter",
        {"bottleneck_dim": 4},
        {
            "bart": {"modified_modules": ["1.fc2"], "unfrozen_modules": ["deltas", "final_layer_norm"]},
            "distilbert": {
                "modified_modules": ["1.ffn.lin2"],
                "unfrozen_modules": ["deltas", "sa_layer_norm", "output_layer_norm"],
            },
            "llama": {
                "modified_modules": ["down_proj"],
                "unfrozen_modules": ["deltas", "input_layernorm", "norm"],
            },
            "gpt2": {"unfrozen_modules": ["deltas", "layer_norm@"]},
            "bert": {"modified_modules": ["1.output.dense"], "unfrozen_modules": ["deltas", "LayerNorm"]},
            "roberta": {"modified_modules": ["0.output.dense"], "unfrozen_modules": ["deltas", "LayerNorm"]},
            "t5": {
                "modified_modules": ["1.layer.0.SelfAttention.o"],
                "unfrozen_modules": ["deltas", "layer_norm"],
            },
            "t5_gated": lacks.AS_T5,
        },
    ),
    Case(
        "adapter_and_weights",
        "adapter",
        {"bottleneck_dim": 4, "non_linearity": "leakyrelu"},
        {
            "bart": {
                "modified_modules": ["encoder_attn.out_proj"],
                "unfrozen_modules": ["deltas", "1.encoder_attn.k_proj"],
            },
            "distilbert": {
                "modified_modules": ["1.ffn.lin2"],
                "unfrozen_modules": ["deltas", "vocab_transform", "1.attention.v_lin"],
            },
            "llama": {"modified_modules": ["o_proj"], "unfrozen_modules": ["deltas", "1.mlp.up_proj"]},
            "gpt2": {
                "modified_modules": ["attn.c_proj"],
                "unfrozen_modules": ["deltas", "wte", "lm_head", "1.mlp.c_fc"],
                "exclude_modules": ["transformer.wpe"],
            },
            "bert": {"unfrozen_modules": ["deltas", "cls", "1.attn@.v@"]},
            "roberta": {"unfrozen_modules": ["deltas", "lm_head"], "exclude_modules": ["roberta.embeddings"]},
            "t5": {
                "modified_modules": ["EncDecAttention.o"],
                "unfrozen_modules": ["deltas", "1.layer.1.EncDecAttention.k"],
            },
            "t5_gated": {
                "modified_modules": ["1.layer.1.DenseReluDense.wo"],
                "unfrozen_modules": ["deltas", "shared", "embed_tokens", "lm_head"],
                "exclude_modules": ["decoder.final_layer_norm"],
            },
        },
    ),
    Case(
        "lora_and_biases",
        "lora",
        {"lora_r": 2},
        {
            "bart": {"modified_modules": ["k_proj"], "unfrozen_modules": ["deltas", "bias"]},
            "distilbert": {"modified_modules": ["k_lin"], "unfrozen_modules": ["deltas", "bias"]},
            "llama": {
                "modified_modules": ["k_proj"],
                "unfrozen_modules": ["deltas", "post_attention_layernorm"],
            },
            "gpt2": lacks.Lack(
                lacks.FUSED, {"modified_modules": ["c_proj"], "unfrozen_modules": ["deltas", "bias"]}
            ),
            "bert": {"unfrozen_modules": ["deltas", "bias"]},
            "roberta": {"unfrozen_modules": ["deltas", "bias"]},
            "t5": {"unfrozen_modules": ["deltas", "final_layer_norm", "layer_norm@"]},
            "t5_gated": {"unfrozen_modules": ["deltas", "relative_attention_bias"]},
        },
    ),
    # A trained task head beside the delta, in the file under the head's own names.
    Case(
        "adapter_and_classifier",
        "adapter",
        {"bottleneck_dim": 4},
        {
            "bart": lacks.NO_BART_HEAD,
            "distilbert": {
                "modified_modules": ["1.ffn.lin2"],
                "unfrozen_modules": ["deltas", "classifier", "pre_classifier"],
            },
            "llama": {"modified_modules": ["down_proj"], "unfrozen_modules": ["deltas", "score"]},
            "gpt2": {"modified_modules": ["mlp.c_proj"], "unfrozen_modules": ["deltas", "score"]},
            "bert": {
                "modified_modules": ["1.output.dense"],
                "unfrozen_modules": ["deltas", "classifier", "pooler"],
            },
            "roberta": {"modified_modules": ["1.output.dense"], "unfrozen_modules": ["deltas", "classifier"]},
            "t5": lacks.NO_CLASSIFIER,
            "t5_gated": lacks.NO_CLASSIFIER,
        },
        head="ForSequenceClassification",
    ),
    Case(
        "bitfit_and_tagger",
        "bitfit",
        {"unfrozen_modules": ["deltas", "classifier"]},
        {
            "bart": lacks.Lack("transformers has no BART for token classification", None),
            "distilbert": {"modified_modules": ["0.ffn"]},
            "llama": lacks.Lack("transformers 4.31 has no Llama for token classification", None),
            "gpt2": {"modified_modules": ["1.mlp"]},
            "bert": {"modified_modules": ["0.intermediate.dense"]},
            "roberta": {"modified_modules": ["1.attention"]},
            "t5": lacks.NO_CLASSIFIER,
            "t5_gated": lacks.NO_CLASSIFIER,
        },
        head="ForTokenClassification",
    ),
)
