"""Puts the engine together inside its process: backbone, KV, residency, scheduler, runner."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import cast

import torch
from transformers.utils import logging as transformers_logging

from deltas.errors import UnsupportedBackbone
from deltas.ops import Mode, native
from server.engine import backbone as backbones
from server.engine import shared
from server.engine.backbone import Backbone
from server.engine.build_encoder import encoder_engine
from server.engine.build_seq2seq import seq2seq_engine
from server.engine.cuda_graphs import cuda_graphs
from server.engine.encoder_engine import EncoderEngine
from server.engine.engine import Engine
from server.engine.info import info_of
from server.engine.kv import KV, SlotKV, token_bytes
from server.engine.messages import Progress, Reply
from server.engine.paged import PAGE, PagedKV
from server.engine.probe import Probe
from server.engine.process import EngineConfig
from server.engine.runner import Runner
from server.engine.scheduler import Scheduler
from server.engine.tokenizer import Tokenizer
from server.errors import InvalidRequest

CPU_KV_SHARE = 0.3  # of the memory that is free when the backbone is loaded
GPU_KV_SHARE = 0.7
SWITCH_SECONDS = (
    0.0002  # Python's 0.005 is how long a loader may hold up the step loop after each operation of a step
)


def build(
    config: EngineConfig, send: Callable[[Reply], None], weights: int | None = None
) -> Engine | EncoderEngine:
    """Finds, checks and loads the backbone, and makes the engine around it.

    ``weights`` is a descriptor of memory into which the backbone's weights go, for others to map (``shared.py``).

    Raises :class:`server.errors.InvalidRequest` for settings that cannot work, before weights are read where possible.
    """
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    data_dir = Path(config.data_dir)
    located = backbones.prepared(backbones.locate(config.backbone, config.backbone_name), data_dir)
    backbones.family(located)
    device = backbones.choose_device(config.device)
    dtype = backbones.choose_dtype(config.dtype, device)
    sys.setswitchinterval(SWITCH_SECONDS)
    torch.set_num_threads(config.threads or len(os.sched_getaffinity(0)))
    kernels = threading.Thread(target=native.load, name="kernel-build")
    kernels.start()  # a first start compiles them while it converts the backbone
    send(Progress("preparing the backbone"))
    folder = backbones.prepare(located, data_dir, lambda reason: send(Progress(reason)))
    send(Progress(f"loading {located.name} as {str(dtype)[6:]} on {device}"))
    try:
        backbone = backbones.load(located.name, folder, device, dtype)
    except UnsupportedBackbone as error:
        raise InvalidRequest(str(error), param="backbone") from error
    if weights is not None:
        _share(backbone, weights)
    if backbone.spec.kind == "encoder-decoder":
        kernels.join()
        return seq2seq_engine(config, backbone, config.kv_bytes or _free_bytes(device), send)
    context = backbone.spec.max_positions
    if config.max_model_len is not None and config.max_model_len > context:
        raise InvalidRequest(
            f"--max-model-len {config.max_model_len} is beyond the backbone's {context} positions",
            param="max_model_len",
        )
    if backbone.spec.kind == "encoder":
        kernels.join()
        return encoder_engine(config, backbone, send)
    capacity = config.max_model_len or context
    per_token = token_bytes(backbone.spec, dtype)
    kv_bytes = config.kv_bytes or _free_bytes(device)
    kv_tokens = kv_bytes // per_token
    if kv_tokens < capacity:
        raise InvalidRequest(
            f"{kv_bytes} bytes for keys and values hold {kv_tokens} tokens, fewer than one row of {capacity}: "
            "lower --max-model-len or raise --kv-bytes",
            param="kv_bytes",
        )
    paged = config.kv == "paged" or (config.kv == "auto" and device.type == "cuda")
    rows, kv_tokens, kv = _kv(config.max_rows, backbone, capacity, kv_tokens, paged=paged)
    kernels.join()
    runner = Runner(
        backbone,
        kv,
        scratch_slot=rows,
        mode=cast("Mode | None", config.ops_mode),
        graph=cuda_graphs() if device.type == "cuda" and config.cuda_graphs else None,
    )
    scheduler = Scheduler(
        max_rows=rows,
        slot_tokens=capacity,
        kv_tokens=kv_tokens,
        prefill_tokens=config.prefill_tokens,
        max_waiting=config.max_waiting,
        queue_timeout=config.queue_timeout,
    )
    info = info_of(
        backbone, max_model_len=capacity, max_rows=rows, eos_token_ids=Tokenizer(folder).eos_token_ids
    )
    return Engine(
        info=info,
        runner=runner,
        probe=Probe(runner),
        scheduler=scheduler,
        send=send,
        delta_bytes=config.delta_bytes,
        host_delta_bytes=config.host_delta_bytes,
        pinned_delta_share=config.pinned_delta_share,
    )


def _share(backbone: backbones.Backbone, fd: int) -> None:
    try:
        shared.share(backbone, fd)
    except shared.SharedWeightsError as error:
        raise InvalidRequest(str(error), param="backbone") from error


def _kv(max_rows: int, backbone: Backbone, capacity: int, tokens: int, *, paged: bool) -> tuple[int, int, KV]:
    """How many rows may run, the tokens that they may hold together, and where these are kept.

    One slot more than rows is scratch. Raises :class:`InvalidRequest` where pages for one row are not left.
    """
    spec, dtype, device = backbone.spec, backbone.dtype, backbone.device
    if paged:
        most = max(1, min(max_rows, (tokens - 2 * capacity) // PAGE - 1))
        left = tokens - capacity - (most + 1) * PAGE  # scratch, and a page of each slot that is not full
        if left < capacity:
            raise InvalidRequest(
                f"{tokens} tokens of keys and values do not hold one row of {capacity} beside as much scratch: "
                "lower --max-model-len or raise --kv-bytes",
                param="kv_bytes",
            )
        held = min(left, most * capacity)
        return most, held, PagedKV(spec, most + 1, capacity, held + capacity, dtype, device)
    # mapped memory is committed as it is written, so on a CPU slots may promise more than the budget
    rows = max_rows if device.type == "cpu" else max(1, min(max_rows, tokens // capacity - 1))
    return rows, min(tokens, rows * capacity), SlotKV(spec, rows + 1, capacity, dtype, device)


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free * GPU_KV_SHARE)
    pages = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return int(pages * CPU_KV_SHARE)
