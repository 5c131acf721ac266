"""The engine process: ``python -m server.engine.process FD`` with settings as JSON on the environment's behalf.

The api process starts it with one end of a socket pair and its settings as the first argument. It leaves when that
socket closes, so it cannot outlive its parent, however the parent ends.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
from pathlib import Path

import msgspec

from server.engine.messages import Fatal, Progress, Ready
from server.engine.wire import EngineSide
from server.errors import DeltaserveError


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What the engine process needs of the settings."""

    backbone: str
    backbone_name: str | None
    data_dir: str
    device: str
    dtype: str
    max_model_len: int | None
    max_rows: int
    max_waiting: int
    prefill_tokens: int
    kv_bytes: int | None
    delta_bytes: int
    host_delta_bytes: int
    threads: int | None
    ops_mode: str | None = None


def main() -> None:
    """Entry point of the child."""
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # a terminal's Ctrl-C goes to the whole group; the parent decides
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    side = EngineSide(socket.socket(fileno=int(sys.argv[1])))
    config = msgspec.json.decode(sys.argv[2].encode(), type=EngineConfig)
    side.send(Progress("importing torch"))
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        from server.engine import build

        engine = build.build(config, side.send)
    except DeltaserveError as error:
        side.send(Fatal(error.message))
        sys.exit(2)
    threading.Thread(target=_read, args=(side, engine.receive), daemon=True, name="inbox").start()
    side.send(Ready(engine.info))
    engine.run()
    # loader threads may be inside native code; nothing of theirs needs an orderly end
    sys.stdout.flush()
    os._exit(0)


def _read(side: EngineSide, receive: object) -> None:
    while True:
        request = side.receive()
        receive(request)  # type: ignore[operator]
        if request is None:
            return


def python_path() -> str:
    """The folder that holds the ``server`` package, for the child's ``PYTHONPATH``."""
    return str(Path(__file__).resolve().parents[2])


if __name__ == "__main__":
    main()
