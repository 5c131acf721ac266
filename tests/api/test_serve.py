"""The command itself, as a process: start, readiness, the printed request, restart, SIGTERM."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tests.api.running import HIDDEN, lora_files, push

COMMAND = [sys.executable, "-c", "from server.cli import main; main()", "serve"]
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama with a byte-level tokenizer."""
    folder = tmp_path_factory.mktemp("backbones") / "tiny"
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: index for index, letter in enumerate(letters)} | {"<end>": len(letters)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")
    fast.chat_template = "{% for m in messages %}{{ m['role'] }}:{{ m['content'] }}\n{% endfor %}"
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=len(vocab),
        max_position_embeddings=256,
        eos_token_id=len(letters),
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@contextmanager
def started(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    """The command, running; killed at the end if it still is."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("DELTASERVE_")}
    with subprocess.Popen(
        [*COMMAND, *arguments],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def printed(process: subprocess.Popen[str], start: str) -> str:
    """The next line that begins so."""
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith(start):
            return line
    raise AssertionError(f"the server ended with {process.wait()} before {start!r}")


def test_start_push_restart_and_end(backbone: Path, tmp_path: Path) -> None:
    data = tmp_path / "data folder"
    flags = ["--backbone", str(backbone), "--port", "0", "--data-dir", str(data), "--dtype", "float32"]
    answers = []
    for start in range(2):
        with started(*flags) as process:
            address = re.search(r"http://\S+", printed(process, "deltaserve listens"))
            assert address is not None
            printed(process, "ready: tiny")
            command = printed(process, "  curl")
            if shutil.which("curl"):
                output = subprocess.run(
                    command, shell=True, capture_output=True, text=True, check=True, timeout=60
                ).stdout
                assert '"chat.completion"' in output
            assert (data / "admin.key").stat().st_mode & 0o777 == 0o600
            key = (data / "admin.key").read_text().strip()
            with httpx.Client(
                base_url=address[0], headers={"authorization": f"Bearer {key}"}, timeout=60
            ) as http:
                assert http.get("/health/ready").status_code == 200
                if start == 0:
                    assert push(http, lora_files(tmp_path / "lora"), name="mine").status_code == 201
                body = {"model": "mine", "prompt": "abc", "max_tokens": 8, "temperature": 0, "logprobs": 0}
                answer = http.post("/v1/completions", json=body)
                assert answer.status_code == 200, answer.text
                base = http.post("/v1/completions", json={**body, "model": "tiny"})
                assert base.json()["choices"][0]["logprobs"] != answer.json()["choices"][0]["logprobs"]
                answers.append((answer.headers["x-delta-digest"], answer.json()["choices"]))
            process.send_signal(signal.SIGTERM)
            assert process.wait(30) == 0
    assert answers[0] == answers[1]


def test_sigterm_while_loading(backbone: Path, tmp_path: Path) -> None:
    with started("--backbone", str(backbone), "--port", "0", "--data-dir", str(tmp_path)) as process:
        address = re.search(r"http://\S+", printed(process, "deltaserve listens"))
        assert address is not None
        transport = httpx.HTTPTransport(retries=20)
        with httpx.Client(base_url=address[0], transport=transport) as http:
            assert http.get("/health/live", timeout=30).status_code == 200
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )


def test_a_bad_backbone_is_a_clear_error(tmp_path: Path) -> None:
    ended = run("--backbone", str(tmp_path / "nothing"), "--port", "0", "--data-dir", str(tmp_path))
    assert ended.returncode == 1
    assert "nothing" in ended.stderr.splitlines()[-1]


def test_a_port_in_use_is_a_clear_error(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        ended = run("--port", str(port), "--data-dir", str(tmp_path / "data"))
    assert ended.returncode == 1
    assert f"cannot listen on 127.0.0.1:{port}" in ended.stderr
    assert not (tmp_path / "data").exists()


def test_wrong_settings_are_named(tmp_path: Path) -> None:
    ended = run("--port", "many", "--data-dir", str(tmp_path))
    assert ended.returncode == 2
    assert "--port (DELTASERVE_PORT)" in ended.stderr
