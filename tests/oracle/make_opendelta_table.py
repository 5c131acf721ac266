"""Make ``fixtures/opendelta_table``: what OpenDelta saves and computes, for every delta model and family.

Run it by hand, in a virtualenv of its own:

    python3.11 -m venv opendelta-env
    opendelta-env/bin/pip install "torch==2.13.0" "numpy<2" "setuptools<81" safetensors "huggingface_hub<0.20" \\
        regex requests tqdm pyyaml packaging rich bigmodelvis
    opendelta-env/bin/pip install --no-deps "opendelta==0.3.2" "delta-center-client==0.0.4" yacs \\
        "transformers==4.31.0" "tokenizers==0.13.3" web.py cheroot more-itertools jaraco.functools jaraco.context \\
        multipart
    opendelta-env/bin/python tests/oracle/make_opendelta_table.py

(transformers 4.31 is the first that has Llama with fewer heads for keys and values than for queries.)

It reads ``fixtures/backbones/<family>`` and writes

    <family>/<case>/               what ``save_finetuned`` wrote, untouched: config.json, pytorch_model.bin
    <family>/expected.safetensors  ``ids.<n>`` int64 [length] (T5 also ``decoder_ids.<n>``), the logits ``base.<n>``
                                   and ``<case>.<n>``, float32 [length, vocab], of the real tokens only
    index.json                     the cases' delta types and arguments, why the library lacks the others; its configs'
                                   defaults, the common names in its tables, versions

The logits are those of a fresh model that *loaded* the saved folder by ``AutoDeltaModel.from_finetuned``, one
unpadded sequence at a time, in one pass.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import logging
import os
import shutil
import sys
import tempfile
import types
import warnings
import zlib
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn

if __package__:
    from tests.oracle.opendelta_cases import CASES, FAMILIES, Case
    from tests.oracle.opendelta_lacks import Lack
else:  # run by path
    from opendelta_cases import (  # type: ignore[import-not-found,no-redef,unused-ignore]
        CASES,
        FAMILIES,
        Case,
    )
    from opendelta_lacks import Lack  # type: ignore[import-not-found,no-redef,unused-ignore]

HERE = Path(__file__).parent
BACKBONES = HERE / "fixtures" / "backbones"
FOLDER = HERE / "fixtures" / "opendelta_table"
LENGTHS = ((1, 2), (5, 3), (9, 5))
LABELS = 3
CLASSES: dict[str, Any] = {
    "llama": transformers.LlamaForCausalLM,
    "gpt2": transformers.GPT2LMHeadModel,
    "bert": transformers.BertForMaskedLM,
    "roberta": transformers.RobertaForMaskedLM,
    "distilbert": transformers.DistilBertForMaskedLM,
    "bart": transformers.BartForConditionalGeneration,
    "t5": transformers.T5ForConditionalGeneration,
    "t5_gated": transformers.T5ForConditionalGeneration,
}
Inputs = dict[str, Tensor]


class _Stub(types.ModuleType):
    """Stands in for a module that OpenDelta imports and does not use (or for its client of a hub)."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Stub(name)


def library() -> Any:
    """OpenDelta, without the graphical and the cloud packages that it imports."""
    for name in ("turtle", "oss2"):
        sys.modules[name] = _Stub(name)
    module = importlib.import_module("opendelta")
    for name in list(logging.root.manager.loggerDict):
        if name.startswith("opendelta"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
    return module


def fresh(family: str, head: str = "") -> Any:
    """The backbone from disk, with another head (then a random one) if ``head`` ends the name of another class.

    Before transformers 5 a T5 whose head is tied always scales the decoder's output.
    """
    path = BACKBONES / family
    kind = CLASSES[family]
    if head:
        kind = getattr(transformers, kind.__name__.replace("LMHeadModel", "For").partition("For")[0] + head)
    model = kind.from_pretrained(path, torch_dtype=torch.float32, **({"num_labels": LABELS} if head else {}))
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    if config.get("scale_decoder_outputs") is False:
        model.config.tie_word_embeddings = False
    return model.eval()


@torch.no_grad()
def logits(model: nn.Module, inputs: Inputs) -> Tensor:
    """Float32 logits ``[length, vocab]`` of one sequence, without those of a soft prompt before it.

    Or what another head gives: ``[labels]``, ``[length, labels]``.
    """
    ids = inputs["ids"][None]
    options = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if "decoder_ids" in inputs:
        options["decoder_input_ids"] = inputs["decoder_ids"][None]
    result: Tensor = model(**options).logits[0]
    if result.dim() == 1:
        return result.float().contiguous()
    return result[-options.get("decoder_input_ids", ids).shape[1] :].float().contiguous()


def redraw(model: nn.Module, seed: int) -> int:
    """Noticeable random values for everything that is trainable; norms around one. Returns how many tensors."""
    generator = torch.Generator().manual_seed(seed)
    count = 0
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        count += 1
        # factors of a factor, of three dimensions, need not be as small
        scale = 0.8 if parameter.dim() == 3 and not name.endswith(".W") else 0.3
        noise = scale * torch.randn(parameter.shape, generator=generator)
        norm = "norm" in name.lower() or ".ln_" in name
        parameter.data.copy_(noise + 1 if norm and name.endswith(".weight") else noise)
    return count


def make_case(opendelta: Any, family: str, case: Case, folder: Path, rows: list[Inputs]) -> list[Tensor]:
    """Save one delta, load it into a fresh backbone and return that model's logits for each row."""
    arguments = {**case.arguments, **case.by_family.get(family, {})}  # type: ignore[dict-item]
    kind = opendelta.auto_delta.LAZY_DELTA_MAPPING[opendelta.auto_delta.LAZY_CONFIG_MAPPING[case.delta]]
    source = fresh(family, case.head)
    delta = kind(source, **arguments)
    if case.warm:
        logits(source, rows[0])
    delta.freeze_module(set_state_dict=True)
    seed = zlib.crc32(f"{family}/{case.name}".encode())
    if not redraw(source, seed):
        raise RuntimeError(f"{family}/{case.name}: nothing is trainable")
    source.eval()
    made = [logits(source, row) for row in rows]
    delta.save_finetuned(str(folder))

    model = fresh(family, case.head)
    loaded = opendelta.AutoDeltaModel.from_finetuned(str(folder), model)
    if case.warm:
        logits(model, rows[0])
        loaded.load_checkpoint(str(folder))
    model.eval()
    results = [logits(model, row) for row in rows]
    for got, wanted in zip(results, made, strict=True):
        if not torch.equal(got, wanted):
            raise RuntimeError(f"{family}/{case.name}: loaded back it gives other logits than before saving")
    return results


def lack(opendelta: Any, family: str, case: Case, why: Lack, rows: list[Inputs]) -> str:
    """The reason for a case without files, with what the library does instead; an error if it can after all."""
    if why.arguments is None:
        return why.reason
    tried = Case(case.name, case.delta, {**case.arguments, **why.arguments}, warm=case.warm)
    with tempfile.TemporaryDirectory() as folder:
        try:
            make_case(opendelta, family, tried, Path(folder), rows)
        except (AttributeError, LookupError, NotImplementedError, RuntimeError, TypeError) as error:
            first = str(error).partition(". ")[0].partition(" ['")[0].strip("\"'")
            return f"{why.reason} ({type(error).__name__}: {first})"
    raise RuntimeError(f"{family}/{case.name}: the library can do it after all")


def make_family(opendelta: Any, family: str) -> tuple[dict[str, Any], dict[str, str]]:
    """All cases of one family; returns the cases made and the reasons for those not made."""
    folder = FOLDER / family
    model = fresh(family)
    generator = torch.Generator().manual_seed(7)
    vocab = model.config.vocab_size
    rows: list[Inputs] = []
    for length, decoder in LENGTHS:
        row = {"ids": torch.randint(3, vocab, (length,), generator=generator)}
        if model.config.is_encoder_decoder:
            row["decoder_ids"] = torch.randint(3, vocab, (decoder,), generator=generator)
            row["decoder_ids"][0] = model.config.decoder_start_token_id
        rows.append(row)
    base = [logits(model, row) for row in rows]
    tensors = {f"{name}.{n}": tensor for n, row in enumerate(rows) for name, tensor in row.items()}
    tensors |= {f"base.{n}": tensor for n, tensor in enumerate(base)}
    made: dict[str, Any] = {}
    lacks: dict[str, str] = {}
    for case in CASES:
        special = case.by_family.get(family, {})
        if isinstance(special, Lack):
            lacks[case.name] = lack(opendelta, family, case, special, rows)
            continue
        results = make_case(opendelta, family, case, folder / case.name, rows)
        for n, (got, plain) in enumerate(zip(results, base, strict=True)):
            change = 1.0 if case.head else float((got - plain).abs().max() / plain.abs().max())
            if change < 0.01:
                raise RuntimeError(
                    f"{family}/{case.name}: hardly changes the logits of row {n} ({change:.3g})"
                )
            tensors[f"{case.name}.{n}"] = got
        made[case.name] = {
            "delta_type": case.delta,
            "arguments": {**case.arguments, **special},
            "head": case.head,
        }
    save_file(tensors, folder / "expected.safetensors")
    return made, lacks


def defaults(opendelta: Any) -> dict[str, dict[str, Any]]:
    """Every key of every config class, with what it is where a file lacks it."""
    classes = opendelta.auto_delta.LAZY_CONFIG_MAPPING
    versions = ("opendelta_version", "transformers_version")
    return {
        kind: {key: value for key, value in classes[kind]().to_dict().items() if key not in versions}
        for kind in classes.keys()  # noqa: SIM118 (its iterator has other keys)
    }


def common_names(opendelta: Any, family: str) -> dict[str, str]:
    """Module path -> common name, of what has one, without the second layers."""
    model = fresh(family)
    try:
        table = opendelta.CommonStructureMap(model)
    except KeyError:
        return {}
    paths = [path for path, _ in model.named_modules() if path and ".1" not in path.replace("layer.1", "")]
    names = {path: table.transform(path, strict=False)[0] for path in paths}
    return {path: name for path, name in names.items() if "@" in name}


def main() -> None:
    os.environ["DELTACENTER_OFFLINE"] = "1"
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call,unused-ignore]
    torch.set_num_threads(1)
    torch.manual_seed(0)
    opendelta = library()
    if FOLDER.exists():
        shutil.rmtree(FOLDER)
    cases: dict[str, Any] = {}
    lacks: dict[str, Any] = {}
    for family in FAMILIES:
        cases[family], lacks[family] = make_family(opendelta, family)
    index = {
        "rows": len(LENGTHS),
        "cases": cases,
        "lacks": lacks,
        "defaults": defaults(opendelta),
        "common_names": {family: common_names(opendelta, family) for family in FAMILIES},
        "versions": {
            "opendelta": importlib.metadata.version("opendelta"),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
    (FOLDER / "index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
