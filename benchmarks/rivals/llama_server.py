"""llama.cpp's server over HTTP: a slot for each request, all sent at once, no prompt cache.

A build for this machine (its instructions, its OpenMP), from the sources of llama.cpp; they are in its repository, too, but
the source package of llama-cpp-python brings a fixed version of them from PyPI (77 MB; the build takes about seven
minutes on two cores):

    pip download --no-deps --no-binary llama-cpp-python llama-cpp-python==0.3.36
    tar xf llama_cpp_python-0.3.36.tar.gz
    cmake -S llama_cpp_python-0.3.36/vendor/llama.cpp -B llama -DCMAKE_BUILD_TYPE=Release \\
        -DLLAMA_OPENSSL=OFF -DLLAMA_USE_PREBUILT_UI=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF
    cmake --build llama -j2 --target llama-server llama-quantize
    python -m benchmarks.mixed_decode --llama-server llama/bin/llama-server

``gguf`` of the argument is the backbone's GGUF file, the same that our weights come from; ``llama-quantize``, beside the
server, turns it into one of bfloat16 or float32. LoRAs come from ``loras``, folders as PEFT saves them, and are written as
GGUF files of the same type; a request names its own by the field ``lora``. The server batches continuously, as it does by
default, but only rows of one LoRA with each other. The time is a client's, over loopback, from sending all prompts to the
last answer; the memory is the server's.
"""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx

TYPES = {"bfloat16": "BF16", "float32": "F32"}
SPARE = 64  # tokens of a slot's context beyond what a request needs
START_S = 120


def main() -> None:
    asked = json.loads(sys.argv[1])
    binary, scratch = Path(asked["llama_server"]), Path(asked["scratch"])
    model = scratch / f"{asked['dtype']}.gguf"
    if not model.exists():
        quantize = [binary.with_name("llama-quantize"), "--allow-requantize", asked["gguf"], model]
        subprocess.run([*quantize, TYPES[asked["dtype"]]], check=True, capture_output=True)
    loras = [lora_file(Path(folder), TYPES[asked["dtype"]], asked["layers"]) for folder in asked["loras"]]
    rows = len(asked["prompts"])
    slot = max(map(len, asked["prompts"])) + asked["new"] + SPARE
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        binary, "-m", model, "--host", "127.0.0.1", "--port", port, "-np", rows, "-c", rows * slot,
        "-t", asked["threads"], "-tb", asked["threads"], "--cont-batching", "--no-cache-prompt", "--cache-ram", 0,
        "--log-verbosity", 1, "--lora-init-without-apply",
        *(["--lora", ",".join(map(str, loras))] if loras else []),
    ]  # fmt: skip
    url = f"http://127.0.0.1:{port}"
    server = subprocess.Popen([str(part) for part in command])
    try:
        wait_for(url, server)
        with httpx.Client(timeout=None, limits=httpx.Limits(max_connections=rows)) as http:
            once(http, url, asked, len(loras), min(4, asked["new"]))
            seconds = min(once(http, url, asked, len(loras), asked["new"]) for _ in range(asked["repeat"]))
        peak = peak_mb(server.pid)
    finally:
        server.terminate()
        server.wait()
    print("RESULT " + json.dumps({"seconds": seconds, "peak_mb": peak}))


def lora_file(folder: Path, dtype: str, layers: int) -> Path:
    """A PEFT folder's LoRA on Llama's linears as a GGUF file of ``dtype`` beside it. Rows of q and k keep Hugging Face's
    order, which is not llama.cpp's: the weights are random, and only the time of their products matters here."""
    import gguf
    from safetensors.numpy import load_file

    path = folder / f"{dtype}.gguf"
    kind = gguf.GGMLQuantizationType[dtype]
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, layers)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_string("general.type", "adapter")
    writer.add_string("adapter.type", "lora")
    config = json.loads((folder / "adapter_config.json").read_text())
    writer.add_float32("adapter.lora.alpha", float(config["lora_alpha"]))
    for key, tensor in load_file(folder / "adapter_model.safetensors").items():
        module, factor = key.removeprefix("base_model.model.").removesuffix(".weight").rsplit(".", 1)
        name = f"{names.get_name(module)}.weight.{factor.lower()}"
        writer.add_tensor(name, gguf.quants.quantize(tensor, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def peak_mb(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) // 1024 for line in lines if line.startswith("VmHWM"))


def wait_for(url: str, server: subprocess.Popen[bytes]) -> None:
    for _ in range(START_S * 10):
        if server.poll() is not None:
            raise SystemExit(f"llama-server ended with {server.returncode}")
        try:
            if httpx.get(f"{url}/health").status_code == 200:
                return
        except httpx.TransportError:
            pass  # not listening yet
        time.sleep(0.1)
    raise SystemExit(f"llama-server was not ready within {START_S} s")


def once(http: httpx.Client, url: str, asked: dict[str, Any], loras: int, new: int) -> float:
    """Seconds until all prompts are answered, each by ``new`` tokens."""

    def ask(i: int) -> None:
        body = {"prompt": asked["prompts"][i], "n_predict": new, "ignore_eos": True, "temperature": 0}
        body |= {"cache_prompt": False, "lora": [{"id": i % loras, "scale": 1.0}] if loras else []}
        answer = http.post(f"{url}/completion", json=body).raise_for_status().json()
        found = (answer["tokens_evaluated"], answer["tokens_predicted"])
        if found != (len(asked["prompts"][i]), new):
            raise SystemExit(f"llama.cpp read and generated {found} tokens")

    count = len(asked["prompts"])
    with ThreadPoolExecutor(count) as pool:
        began = time.perf_counter()
        list(pool.map(ask, range(count)))
        return time.perf_counter() - began


if __name__ == "__main__":
    main()
