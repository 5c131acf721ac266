"""The cases of ``make_adapterhub_table.py``: one adapter configuration each, and what the library cannot do with it.

Imported in the virtualenv of AdapterHub's library only (see there). The tests read ``index.json`` instead.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from adapters import (  # type: ignore[import-not-found,unused-ignore]
    AdapterPlusConfig,
    BnConfig,
    CompacterConfig,
    CompacterPlusPlusConfig,
    ConfigUnion,
    DoRAConfig,
    DoubleSeqBnConfig,
    IA3Config,
    LoRAConfig,
    LoReftConfig,
    MAMConfig,
    ParBnConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    SeqBnConfig,
    SeqBnInvConfig,
    UniPELTConfig,
    VeraConfig,
)
from adapters.configuration.adapter_config import (  # type: ignore[import-not-found,unused-ignore]
    DvoRAConfig,
    MTLLoRAConfig,
)
from adapters.configuration.adapter_fusion_config import (  # type: ignore[import-not-found,unused-ignore]
    DynamicAdapterFusionConfig,
)

FAMILIES = ("llama", "gpt2", "bert", "roberta", "distilbert", "bart", "t5")
GATED = (*FAMILIES, "t5_gated")
CAUSAL = ("llama", "gpt2")
ENCODERS = ("bert", "roberta", "distilbert")
HEADED = (*CAUSAL, *ENCODERS)
TWO = ("llama", "bert")  # pre-norm and post-norm: enough for a variant that does not touch the keys
THREE = (*TWO, "t5")


@dataclass(frozen=True)
class Case:
    """One adapter to make for every family in ``families``.

    ``edit`` is laid over the saved ``adapter_config.json``; a key whose value is ``None`` is taken out. ``default``
    saves as the library does by default: pickled, with the head. ``like`` repeats another case's weights. Cases with
    ``parts`` save a composition of several adapters; those with ``head`` a trained head, of ``AutoAdapterModel`` or, of
    kind ``static``, of the class of transformers for ``task``.
    """

    name: str
    config: Any
    families: tuple[str, ...] = FAMILIES
    edit: Mapping[str, Any] | None = None
    default: bool = False
    like: str = ""
    parts: str = ""
    head: Mapping[str, Any] | None = None


SMALL = SeqBnConfig(reduction_factor=8)
MH_PARALLEL = ParBnConfig(reduction_factor=8, mh_adapter=True, output_adapter=False)
LORA_ALL = LoRAConfig(r=3, alpha=5, attn_matrices=["q", "k", "v"], intermediate_lora=True, output_lora=True)
PREFIX = PrefixTuningConfig(prefix_length=3, bottleneck_size=6)
LABELS = {0: "calm", 1: "angry", 2: "sad"}
FUSIONS: Mapping[str, Any] = {
    "fuse": "dynamic",
    "fuse_static": "static",
    "stack_fuse": "static",
    "fuse_options": DynamicAdapterFusionConfig(
        query_before_ln=True, residual_before=True, value_before_softmax=False
    ).to_dict(),
}


def _prefix(**changes: Any) -> Any:
    return PREFIX.replace(**changes)


CASES = (
    # Bottlenecks: where, in which order, and what is around them.
    Case("seq_bn", SMALL),
    Case("seq_bn_default", SMALL, default=True, like="seq_bn"),
    Case("double_seq_bn", DoubleSeqBnConfig(reduction_factor=8)),
    Case("par_bn", ParBnConfig(reduction_factor=8)),
    Case("par_bn_mh", MH_PARALLEL),
    Case("par_bn_both", ParBnConfig(reduction_factor=8, mh_adapter=True, scaling=0.5), TWO),
    Case("scaled_learned", ParBnConfig(reduction_factor=8, scaling="learned"), THREE),
    Case("scaled_channel", SeqBnConfig(reduction_factor=8, scaling="channel"), TWO),
    Case("leave_out", DoubleSeqBnConfig(reduction_factor=8, leave_out=[1])),
    Case("by_layer", SeqBnConfig(reduction_factor={"0": 5, "1": 100, "default": 16})),
    Case("ln_before", SeqBnConfig(reduction_factor=8, ln_before=True)),
    Case("ln_after", DoubleSeqBnConfig(reduction_factor=8, ln_after=True), TWO),
    Case(
        "ln_after_residual",
        SeqBnConfig(reduction_factor=8, ln_before=True, ln_after=True, adapter_residual_before_ln=True),
        TWO,
    ),
    Case("ln_parallel", ParBnConfig(reduction_factor=8, ln_before=True, ln_after=True), TWO),
    Case("residual_after_ln", SeqBnConfig(reduction_factor=8, residual_before_ln=False), TWO),
    Case("residual_post_add", SeqBnConfig(reduction_factor=8, residual_before_ln="post_add"), TWO),
    Case("adapter_plus", AdapterPlusConfig(reduction_factor=8, stochastic_depth=0.0), TWO),
    Case("no_ln_after", SeqBnConfig(reduction_factor=8, original_ln_after=False), TWO),
    Case("gated_bn", SeqBnConfig(reduction_factor=8, use_gating=True)),
    Case("cross_bn", DoubleSeqBnConfig(reduction_factor=8, cross_adapter=True), ("bart", "t5")),
    # Non-linearities. Without a version, "gelu" means gelu_new and "gelu_orig" gelu.
    Case("gelu", SeqBnConfig(reduction_factor=8, non_linearity="gelu"), TWO),
    Case(
        "gelu_unversioned",
        SeqBnConfig(reduction_factor=8, non_linearity="gelu"),
        TWO,
        edit={"version": None},
        like="gelu",
    ),
    Case("tanh", SeqBnConfig(reduction_factor=8, non_linearity="tanh"), TWO),
    Case("sigmoid", SeqBnConfig(reduction_factor=8, non_linearity="sigmoid"), TWO),
    Case("leakyrelu", SeqBnConfig(reduction_factor=8, non_linearity="leakyrelu"), TWO),
    # Invertible adapters at the embeddings.
    Case("inv_nice", SeqBnInvConfig(reduction_factor=8)),
    Case("inv_glow", SeqBnInvConfig(reduction_factor=8, inv_adapter="glow"), ("llama", "bert")),
    # Hypercomplex projections.
    Case("compacter", CompacterConfig(reduction_factor=8)),
    Case("compacterplusplus", CompacterPlusPlusConfig(reduction_factor=8)),
    Case(
        "compacter_own",
        CompacterPlusPlusConfig(
            reduction_factor=8,
            phm_dim=2,
            shared_phm_rule=False,
            factorized_phm_rule=True,
            factorized_phm_W=False,
        ),
        THREE,
    ),
    Case(
        "compacter_shared",
        CompacterPlusPlusConfig(
            reduction_factor=8,
            phm_dim=2,
            factorized_phm_rule=True,
            shared_W_phm=True,
            phm_bias=False,
            phm_rank=2,
        ),
        TWO,
    ),
    # Low rank.
    Case("lora", LoRAConfig(r=4, alpha=4)),
    Case("lora_all", LORA_ALL, GATED),
    Case("lora_k", LoRAConfig(r=4, alpha=6, attn_matrices=["k"], leave_out=[0]), HEADED),
    Case("lora_before_1_1", LoRAConfig(r=4, alpha=10), HEADED, edit={"version": "adapters.1.0.1"}),
    Case("lora_gated", LoRAConfig(r=4, alpha=6, use_gating=True), THREE),
    Case("mtl_lora", MTLLoRAConfig(r=4, alpha=6, n_up_projection=2), (*TWO, "gpt2")),
    Case("dora", DoRAConfig(r=4, alpha=6)),
    Case(
        "dora_mlp",
        DoRAConfig(r=4, alpha=6, selfattn_lora=False, intermediate_lora=True, output_lora=True),
        ("llama", "gpt2", "bert"),
    ),
    Case("vera", VeraConfig(r=4)),
    Case("vera_one", VeraConfig(r=4, alpha=6, selfattn_lora=False, intermediate_lora=True), HEADED),
    Case("dvora", DvoRAConfig(r=4, attn_matrices=["q"]), TWO),
    Case("ia3", IA3Config(), GATED),
    Case("ia3_alpha", IA3Config(alpha=2, output_lora=True), HEADED),
    Case("ia3_gated", IA3Config(use_gating=True)),
    # Prefixes and prompts.
    Case("prefix", PREFIX),
    Case("prefix_flat", _prefix(flat=True)),
    Case("prefix_leave_out", _prefix(flat=True, leave_out=[0]), THREE),
    Case("prefix_self_only", _prefix(flat=True, cross_prefix=False, encoder_prefix=False), ("bart", "t5")),
    Case("prefix_gated", _prefix(use_gating=True)),
    Case("prefix_gates", _prefix(flat=True, use_gating=True, shared_gating=False), TWO),
    Case("prompt", PromptTuningConfig(prompt_length=3)),
    Case("prompt_after_bos", PromptTuningConfig(prompt_length=3, combine="prefix_after_bos")),
    # Unions.
    Case("mam", MAMConfig(PREFIX, ParBnConfig(reduction_factor=8))),
    Case("unipelt", UniPELTConfig(PREFIX, SMALL, LoRAConfig(r=4, alpha=2)), TWO),
    Case("union_ungated", ConfigUnion(_prefix(flat=True), SMALL, LORA_ALL), TWO),
    Case(
        "union_two_bn",
        ConfigUnion(
            BnConfig(mh_adapter=True, output_adapter=False, reduction_factor=8, non_linearity="relu"),
            ParBnConfig(reduction_factor=4),
        ),
        TWO,
    ),
    Case("loreft", LoReftConfig(r=2), ("llama",)),
    # Compositions of two adapters.
    Case("fuse", SMALL, parts="fuse"),
    Case("fuse_parallel", ParBnConfig(reduction_factor=8), ("llama",), parts="fuse"),
    Case("fuse_static", SMALL, ("bert",), parts="fuse_static"),
    Case("fuse_options", SMALL, ("bert",), parts="fuse_options"),
    Case("stack_fuse", DoubleSeqBnConfig(reduction_factor=8), ("bert",), parts="stack_fuse"),
    Case("stack", SMALL, parts="stack"),
    Case("stack_double", DoubleSeqBnConfig(reduction_factor=8), TWO, parts="stack"),
    Case("stack_parallel", ParBnConfig(reduction_factor=8), TWO, parts="stack"),
    Case("stack_lora", LoRAConfig(r=4, alpha=6), HEADED, parts="stack"),
    Case("stack_prefix", _prefix(flat=True), TWO, parts="stack"),
    # Trained heads (AutoAdapterModel).
    Case(
        "head_classification",
        SMALL,
        HEADED,
        head={"kind": "classification", "num_labels": 3, "id2label": LABELS, "use_pooler": False},
    ),
    Case(
        "head_pooler", SMALL, ("bert",), head={"kind": "classification", "num_labels": 3, "use_pooler": True}
    ),
    Case(
        "head_linear",
        LoRAConfig(r=4, alpha=4),
        ENCODERS,
        head={"kind": "classification", "num_labels": 2, "layers": 1, "use_pooler": False},
    ),
    # Hugging Face's own classes for tasks.
    Case(
        "static_sequence",
        SMALL,
        (*CAUSAL, "roberta", "distilbert"),
        head={"kind": "static", "task": "SequenceClassification"},
    ),
    Case("static_token", SMALL, HEADED, head={"kind": "static", "task": "TokenClassification"}),
    Case("head_tagging", SMALL, HEADED, head={"kind": "tagging", "num_labels": 3, "id2label": LABELS}),
)
