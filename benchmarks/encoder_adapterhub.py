"""AdapterHub's ``BatchSplit`` for ``encoder_mixed.py``: runs alone, in an environment that has ``adapters``.

    python encoder_adapterhub.py FOLDER DTYPE THREADS CLOCK CASE < batches.json and words

The first line of the input is a JSON list of batches, each a list of rows of token ids. Then, for every line with a
batch's number, it runs that batch, row i with adapter i, and answers with a line of seconds.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

RANK, REDUCTION = 8, 16


def main() -> None:
    folder, dtype, threads, which, case = sys.argv[1:6]
    clock = time.perf_counter if which == "wall" else time.process_time
    import adapters
    import torch
    from adapters.composition import BatchSplit
    from transformers import AutoModel

    torch.set_num_threads(int(threads))
    model: Any = AutoModel.from_pretrained(
        folder, dtype=getattr(torch, dtype), add_pooling_layer=False
    ).eval()
    adapters.init(model)
    if case == "loras":
        config = adapters.LoRAConfig(
            r=RANK, alpha=16, selfattn_lora=True, intermediate_lora=True, output_lora=True,
            attn_matrices=["q", "k", "v"],
        )  # fmt: skip
    else:
        config = adapters.SeqBnConfig(reduction_factor=REDUCTION)
    batches = [padded(rows) for rows in json.loads(sys.stdin.readline())]
    names = [f"a{i}" for i in range(max(len(ids) for ids, _ in batches))]
    for name in names:
        model.add_adapter(name, config=config)
    model.to(getattr(torch, dtype)).eval()
    print("READY", flush=True)
    for line in sys.stdin:
        ids, mask = batches[int(line)]
        split = BatchSplit(*names[: len(ids)], batch_sizes=[1] * len(ids))
        with torch.inference_mode():
            began = clock()
            with adapters.AdapterSetup(split):
                model(input_ids=ids, attention_mask=mask)
            print(clock() - began, flush=True)


def padded(rows: list[list[int]]) -> tuple[Any, Any]:
    """Token ids and attention mask ``[rows, longest]``."""
    import torch

    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
    lengths = torch.tensor([len(row) for row in rows])
    return ids, (torch.arange(ids.shape[1]) < lengths[:, None]).long()


if __name__ == "__main__":
    main()
