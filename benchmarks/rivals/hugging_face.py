"""transformers' ``generate`` with one static batch, and PEFT's ``adapter_names`` and switching by the same ``generate``.

Both come with deltaserve's development extras; ``what`` may also be as ``switching 8 loras``. LoRAs are of rank 8 on all
linears, with random weights.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from typing import Any

from benchmarks.common import RANK


def main() -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    asked = json.loads(sys.argv[1])
    torch.set_num_threads(asked["threads"])
    dtype = getattr(torch, asked["dtype"])
    model: Any = AutoModelForCausalLM.from_pretrained(asked["folder"], dtype=dtype)
    model = model.eval().to(asked["device"])
    what = asked["what"]
    count = 0 if what == "base" else int(what.split()[-2])
    if count:
        linears = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        lora = LoraConfig(r=RANK, lora_alpha=16, target_modules=linears, init_lora_weights=False)
        model = get_peft_model(model, lora, adapter_name="a0")
        for i in range(1, count):
            model.add_adapter(f"a{i}", lora)
        model.eval()
    ids = torch.tensor(asked["prompts"], device=asked["device"])
    names = [f"a{i % count}" for i in range(len(ids))] if count else None

    @torch.inference_mode()
    def generate(rows: Any, new: int, **extra: Any) -> None:
        mask = torch.ones_like(rows)
        model.generate(
            input_ids=rows, attention_mask=mask, max_new_tokens=new, min_new_tokens=new, do_sample=False,
            pad_token_id=2, **extra,
        )  # fmt: skip

    def once(new: int) -> float:
        began = time.perf_counter()
        if "switching" in what:
            for i in range(min(count, len(ids))):
                model.set_adapter(f"a{i}")
                generate(ids[i::count], new)
        elif names is not None:
            generate(ids, new, adapter_names=names)
        else:
            generate(ids, new)
        return time.perf_counter() - began

    once(min(4, asked["new"]))
    seconds = min(once(asked["new"]) for _ in range(asked["repeat"] if count < 32 else 1))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    print("RESULT " + json.dumps({"seconds": seconds, "peak_mb": peak}))


if __name__ == "__main__":
    main()
