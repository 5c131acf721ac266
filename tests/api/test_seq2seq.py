"""Encoder-decoders behind the command line: a tiny T5, a LoRA for it that PEFT saved, clear errors, a tiny BART."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSeq2SeqLM

from tests.api.command import Server, serving
from tests.api.encoders import pushed, refused
from tests.seq2seq import write_bart, write_t5

CLOSE = 1e-4
TEXTS = ["w9 w11 w30", "w5", " ".join(f"w{5 + n * 7 % 56}" for n in range(90))]
STEPS = 9


def ids_of(text: str) -> list[int]:
    return [*(int(word[1:]) for word in text.split()), 1]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("tiny")
    backbone = write_t5(folder / "t5-tiny", "t5_gated", untied=True)
    flags = ("--backbone", str(backbone), "--dtype", "float32", "--threads", "1", "--max-model-len", "100")
    with serving(folder / "data", *flags) as server:
        yield server


def folder_of(server: Server) -> Path:
    return server.data.parent / "t5-tiny"


@pytest.fixture(scope="module")
def tuned(tiny: Server, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, list[Path]]:
    """A model with a LoRA, and what PEFT saved of it."""
    torch.manual_seed(5)
    config = LoraConfig(task_type="SEQ_2_SEQ_LM", r=4, target_modules=["q", "v", "wi_1", "wo"])
    model = get_peft_model(AutoModelForSeq2SeqLM.from_pretrained(folder_of(tiny)), config).eval()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(0, 0.5)
    folder = tmp_path_factory.mktemp("lora")
    model.save_pretrained(folder)
    return model, [folder / "adapter_config.json", folder / "adapter_model.safetensors"]


def generated(model: Any, text: str) -> list[int]:
    found = model.generate(input_ids=torch.tensor([ids_of(text)]), do_sample=False, max_new_tokens=STEPS)
    return list(found[0, 1:].tolist())


def check(model: Any, text: str, choice: dict[str, Any]) -> None:
    """Tokens, text and log-probabilities are those of Hugging Face's model."""
    wanted = generated(model, text)
    assert choice["token_ids"] == wanted
    assert choice["prompt_token_ids"] == ids_of(text)
    ended = wanted[-1] == 1
    assert choice["finish_reason"] == ("stop" if ended else "length")
    assert choice["text"].split() == [f"w{token}" for token in wanted if token >= 5]
    with torch.no_grad():
        answer = torch.tensor([[0, *wanted]])
        logits = model(input_ids=torch.tensor([ids_of(text)]), decoder_input_ids=answer).logits[0, :-1]
    logprobs = logits.log_softmax(-1)[torch.arange(len(wanted)), torch.tensor(wanted)]
    assert torch.allclose(torch.tensor(choice["logprobs"]["token_logprobs"]), logprobs, atol=CLOSE)


def ask(http: httpx.Client, **body: object) -> httpx.Response:
    given = {
        "model": "t5-tiny",
        "temperature": 0,
        "max_tokens": STEPS,
        "logprobs": 1,
        "return_token_ids": True,
    }
    return http.post("/v1/completions", json=given | body)


def test_completions_of_the_backbone_and_of_pefts_lora(tiny: Server, tuned: tuple[Any, list[Path]]) -> None:
    model, files = tuned
    with tiny.http() as http:
        made = pushed(http, "tuned", files)
        assert (made["format"], made["methods"], made["rank"]) == ("peft", ["lora"], 4)
        answer = ask(http, model="tuned", prompt=TEXTS)
        assert answer.headers["x-delta-digest"] == made["digest"]
        for text, choice in zip(TEXTS, answer.json()["choices"], strict=True):
            check(model, text, choice)
        sources, answers = sum(len(ids_of(text)) for text in TEXTS), answer.json()["choices"]
        tokens = sum(len(choice["token_ids"]) for choice in answers)
        usage = answer.json()["usage"]
        assert (usage["prompt_tokens"], usage["completion_tokens"]) == (sources, tokens)
        with model.disable_adapter():
            for text, choice in zip(TEXTS, ask(http, prompt=TEXTS).json()["choices"], strict=True):
                check(model, text, choice)
        assert [generated(model, text) for text in TEXTS] == [choice["token_ids"] for choice in answers]


def test_streams(tiny: Server) -> None:
    with tiny.http() as http:
        whole = ask(http, prompt=TEXTS[0], n=2).json()["choices"]
        body = {
            "model": "t5-tiny",
            "prompt": TEXTS[0],
            "temperature": 0,
            "max_tokens": STEPS,
            "stream": True,
            "n": 2,
        }
        told = {0: "", 1: ""}
        with http.stream("POST", "/v1/completions", json=body) as response:
            lines = [line.removeprefix("data: ") for line in response.iter_lines() if line]
        assert lines[-1] == "[DONE]"
        for line in lines[:-1]:
            for choice in json.loads(line)["choices"]:
                told[choice["index"]] += choice["text"]
        assert [told[choice["index"]] for choice in whole] == [choice["text"] for choice in whole]


def test_what_it_does_not_do(tiny: Server) -> None:
    chat = {"model": "t5-tiny", "messages": [{"role": "user", "content": "w9"}]}
    with tiny.http() as http:
        assert "echo" in refused(ask(http, prompt="w9", echo=True), "invalid_request")
        assert "at most 100 tokens" in refused(ask(http, prompt=[9] * 101), "context_length_exceeded")
        usage = ask(http, prompt=[9] * 100, max_tokens=1000, ignore_eos=True).json()["usage"]
        assert (usage["prompt_tokens"], usage["completion_tokens"]) == (100, 99)
        refused(ask(http, prompt=[]), "invalid_request")
        refused(http.post("/v1/chat/completions", json=chat), "no_chat_template")
        embed = http.post("/v1/embeddings", json={"model": "t5-tiny", "input": "w9"})
        assert "no encoder" in refused(embed, "unsupported_task")


def test_a_bart_that_forces_a_first_token(tmp_path: Path) -> None:
    folder = write_bart(tmp_path / "bart-tiny", forced_bos_token_id=0)
    model = AutoModelForSeq2SeqLM.from_pretrained(folder).eval()
    flags = ("--backbone", str(folder), "--dtype", "float32", "--threads", "1")
    with serving(tmp_path / "data", *flags) as server, server.http() as http:
        for text in TEXTS[:2]:
            (choice,) = ask(http, model="bart-tiny", prompt=text).json()["choices"]
            source = [0, *ids_of(text)[:-1], 2]
            assert choice["prompt_token_ids"] == source
            made = model.generate(torch.tensor([source]), do_sample=False, max_new_tokens=STEPS + 1)[0]
            assert made[:2].tolist() == [2, 0]
            assert choice["token_ids"] == made[2:].tolist()
            assert choice["text"].split() == [f"w{token}" for token in choice["token_ids"] if token >= 5]
        message = refused(ask(http, model="bart-tiny", prompt=TEXTS[2]), "context_length_exceeded")
        assert "reads at most 48 tokens" in message
