"""Make ``fixtures/adapterhub_table``: what AdapterHub's ``adapters`` saves and computes, for every method and family.

Run it by hand, in the virtualenv that ``make_adapterhub_fixtures.py`` describes:

    adapterhub-env/bin/python tests/oracle/make_adapterhub_table.py [family ...]

It reads ``fixtures/backbones/<family>`` and writes

    <family>/<case>/               what the library saved, untouched but for the case's own edit of the config
    <family>/expected.safetensors  ``ids.<n>`` int64 [length] (T5 also ``decoder_ids.<n>``), the logits ``base.<n>`` and
                                   ``<case>.<n>``, float32 [length, vocab] or what the head gives; ``pooler.*``: the
                                   random pooler that the backbone's folder lacks
    <family>/index.json            the cases' names, configurations and heads, and why the library lacks the others

The logits are those of a fresh model that *loaded* the saved folder, one unpadded sequence at a time, without a cache
and with ``eager`` attention: under ``sdpa`` the library (1.3.0 on transformers 4.57) hides prefixes behind the mask.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shutil
import warnings
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import adapters  # type: ignore[import-not-found,unused-ignore]
import torch
import transformers
from adapters.composition import Fuse, Stack  # type: ignore[import-not-found,unused-ignore]
from safetensors.torch import save_file
from torch import Tensor, nn

if __package__:
    from tests.oracle.adapterhub_cases import CASES, FUSIONS, GATED, Case
    from tests.oracle.adapterhub_lacks import LACKS
else:  # run by path
    from adapterhub_cases import (  # type: ignore[import-not-found,no-redef,unused-ignore]
        CASES,
        FUSIONS,
        GATED,
        Case,
    )
    from adapterhub_lacks import LACKS  # type: ignore[import-not-found,no-redef,unused-ignore]

HERE = Path(__file__).parent
BACKBONES = HERE / "fixtures" / "backbones"
FOLDER = HERE / "fixtures" / "adapterhub_table"
LENGTHS = ((1, 2), (5, 3), (9, 4))  # T5: encoder, decoder
ADAPTER = "tone"
PARTS, BELOW = ("first", "second"), "below"
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
NAMES = {"llama": "Llama", "gpt2": "GPT2", "bert": "Bert", "roberta": "Roberta", "distilbert": "DistilBert"}
SEQUENCES = (transformers.BartForConditionalGeneration, transformers.T5ForConditionalGeneration)
MASKED = ("bert", "roberta", "distilbert")
Inputs = dict[str, Tensor]


def fresh(family: str, head: Mapping[str, Any] | None = None) -> Any:
    """The backbone from disk, ready for adapters; with ``head`` in a class for trained heads."""
    options = {"dtype": torch.float32, "attn_implementation": "eager", "local_files_only": True}
    path = os.path.relpath(BACKBONES / family)
    if head is None or head["kind"] == "static":
        task = None if head is None else f"{NAMES[family]}For{head['task']}"
        model_class = CLASSES[family] if task is None else getattr(transformers, task)
        model = model_class.from_pretrained(path, **options)
        if (
            family == "t5_gated"
        ):  # this version scales a tied head's input whatever scale_decoder_outputs says
            model.config.tie_word_embeddings = False
        adapters.init(model)
        return model.eval()
    model = adapters.AutoAdapterModel.from_pretrained(path, **options)
    pooler = getattr(model.base_model, "pooler", None)
    if pooler is not None:
        generator = torch.Generator().manual_seed(77)
        for parameter in pooler.parameters():
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model.eval()


def redraw(model: nn.Module, names: tuple[str, ...], seed: int) -> list[str]:
    """Give every tensor of these adapters and heads noticeable values; returns the tensors' names."""
    generator = torch.Generator().manual_seed(seed)
    drawn = []
    with torch.no_grad():
        for key, parameter in sorted(model.named_parameters()):
            head = key.startswith(("classifier.", "score."))
            if not (head or any(f".{name}." in key for name in names)) or "parametrizations" in key:
                continue
            noise = torch.randn(parameter.shape, generator=generator)
            near_one = key.endswith((".scaling",)) or ("norm" in key and key.endswith("weight"))
            if ".m." in key:  # DoRA's magnitudes
                parameter.mul_(1 + 0.3 * noise)
            elif near_one or (key.endswith("lora_B") and parameter.dim() == 2 and parameter.shape[1] == 1):
                parameter.copy_(1 + 0.4 * noise)
            else:  # a hypercomplex matrix is a product of up to four of these
                parameter.copy_((0.8 if "phm_rule" in key or ".W" in key else 0.3) * noise)
            drawn.append(key)
    return drawn


@torch.no_grad()
def outputs(model: Any, rows: list[Inputs]) -> list[Tensor]:
    results = []
    for row in rows:
        extra = {} if model.config.model_type in MASKED else {"use_cache": False}
        result: Tensor = model(**{key: ids[None] for key, ids in row.items()}, **extra).logits[0]
        results.append(result.float().contiguous())
    return results


def setup_of(case: Case) -> Any:
    """The active composition of a case with parts."""
    if case.parts == "stack_fuse":
        return Stack(BELOW, Fuse(*PARTS))
    return Stack(*PARTS) if case.parts == "stack" else Fuse(*PARTS)


def build(case: Case, model: Any, seed: int) -> None:
    """Add the case's adapters, fusion and head, with random weights."""
    names = PARTS if case.parts else (ADAPTER,)
    if case.parts == "stack_fuse":
        names = (*PARTS, BELOW)
    for name in names:
        model.add_adapter(name, config=case.config)
    if case.head is not None and case.head["kind"] != "static":
        options = dict(case.head)
        getattr(model, f"add_{options.pop('kind')}_head")(ADAPTER, **options)
    drawn_names = names
    if case.parts in FUSIONS:
        model.add_adapter_fusion(Fuse(*PARTS), FUSIONS[case.parts])
        drawn_names = (*names, ",".join(PARTS))
    if not redraw(model, drawn_names, seed):
        raise RuntimeError(f"{case.name}: no tensors")
    model.set_active_adapters(setup_of(case) if case.parts else ADAPTER)
    model.eval()


def save(case: Case, model: Any, folder: Path) -> bool:
    """Save as safetensors where the library can, which is where no tensor has two names; true if pickled."""

    def write(**options: Any) -> None:
        if case.parts:
            model.save_adapter_setup(str(folder), setup_of(case), **options)
        elif case.default:
            model.save_adapter(str(folder), ADAPTER)
        else:
            model.save_adapter(str(folder), ADAPTER, with_head=case.head is not None, **options)

    pickled = case.default
    try:
        write(use_safetensors=True)
    except RuntimeError as error:
        if "share memory" not in str(error):
            raise
        pickled = True
        shutil.rmtree(folder)
        write()
    if case.parts:  # every part comes with a copy of the backbone's head: one of them is enough here
        for copy in folder.glob("*/*head*" if case.name != "fuse" else f"{PARTS[1]}/*head*"):
            copy.unlink()
    if case.edit is not None:
        path = folder / "adapter_config.json"
        config = json.loads(path.read_text(encoding="utf-8"))
        for key, value in case.edit.items():
            config[key] = value
            if value is None:
                del config[key]
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return pickled


def load(case: Case, family: str, folder: Path, pickled: bool) -> Any:
    """A fresh model that loaded the case's folder."""
    model = fresh(family, case.head)
    info: dict[str, list[str]] = {}
    if case.parts:
        model.load_adapter_setup(str(folder), set_active=True, use_safetensors=not pickled)
    else:
        model.load_adapter(str(folder), use_safetensors=not pickled, loading_info=info, set_active=True)
    lost = [key for keys in info.values() for key in keys if f".{ADAPTER}." in key]
    if lost:
        raise RuntimeError(f"{case.name}: the library itself did not load {lost}")
    return model.eval()


def make_case(case: Case, family: str, rows: list[Inputs], base: list[Tensor]) -> list[Tensor]:
    """Save one case, load it back and return what it gives for each row."""
    folder = Path(family) / case.name
    seed = zlib.crc32((case.like or case.name).encode())
    torch.manual_seed(seed)
    source = fresh(family, case.head)
    build(case, source, seed)
    here = outputs(source, rows)  # before saving: a case that cannot run leaves no folder
    loaded = outputs(load(case, family, folder, save(case, source, folder)), rows)
    changes = []
    for plain, before, after in zip(base, here, loaded, strict=True):
        if case.edit is None and not torch.equal(before, after):
            raise RuntimeError(f"{case.name}: loading back gives other logits than before saving")
        if not after.isfinite().all():
            raise RuntimeError(f"{case.name}: NaN")
        if after.shape == plain.shape:
            changes.append(float((after - plain).abs().max() / plain.abs().max()))
    if changes and max(changes) < 0.02:
        raise RuntimeError(f"{case.name}: the adapter hardly changes the logits ({max(changes):.3g})")
    return loaded


def make_family(family: str) -> None:
    """Write one family's folder, in the current directory."""
    shutil.rmtree(family, ignore_errors=True)
    Path(family).mkdir()
    generator = torch.Generator().manual_seed(5)
    rows: list[Inputs] = []
    for length, target in LENGTHS:
        row = {"input_ids": torch.randint(3, 61, (length,), generator=generator)}
        if CLASSES[family] in SEQUENCES:
            start = torch.zeros(1, dtype=torch.int64)
            row["decoder_input_ids"] = torch.cat(
                [start, torch.randint(3, 61, (target - 1,), generator=generator)]
            )
        rows.append(row)
    plain = fresh(family)
    base = outputs(plain, rows)
    tensors: dict[str, Tensor] = {}
    for n, row in enumerate(rows):
        tensors[f"ids.{n}"] = row["input_ids"]
        if "decoder_input_ids" in row:
            tensors[f"decoder_ids.{n}"] = row["decoder_input_ids"]
        tensors[f"base.{n}"] = base[n]
    cases: dict[str, Any] = {}
    lacks: dict[str, str] = {}
    for case in CASES:
        if family not in case.families:
            continue
        reason = LACKS.get((case.name, family))
        try:
            results = make_case(case, family, rows, base)
        except (ValueError, RuntimeError, TypeError, LookupError, AttributeError, NameError) as error:
            if reason is None:
                print(f"{family}/{case.name}: {type(error).__name__}: {str(error).strip()[:300]}")
            shutil.rmtree(Path(family) / case.name, ignore_errors=True)
            lacks[case.name] = reason or str(error)
            continue
        if reason is not None:
            raise RuntimeError(f"{family}/{case.name} works: {reason}")
        for n, result in enumerate(results):
            if not case.like or not torch.equal(result, tensors[f"{case.like}.{n}"]):
                tensors[f"{case.name}.{n}"] = result
        cases[case.name] = {"head": None if case.head is None else case.head["kind"], "like": case.like}
        if case.head is not None and case.head.get("use_pooler"):
            pooler = fresh(family, case.head).base_model.pooler
            tensors |= {f"pooler.{key}": value for key, value in pooler.state_dict().items()}
    save_file(tensors, f"{family}/expected.safetensors")
    index = {
        "cases": cases,
        "lacks": lacks,
        "rows": len(rows),
        "versions": {
            "adapters": adapters.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
    Path(family, "index.json").write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
    print(f"{family}: {len(cases)} cases, {len(lacks)} that the library lacks")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("families", nargs="*", default=GATED)
    families = parser.parse_args().families
    FOLDER.mkdir(parents=True, exist_ok=True)
    # The library writes the backbone's path into every config: make it a relative one.
    os.chdir(FOLDER)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    for family in families:
        make_family(family)


if __name__ == "__main__":
    main()
