"""The engine process: ``python -m server.engine.process FD SETTINGS [WEIGHTS]``.

The settings are an :class:`EngineConfig` in JSON, ``WEIGHTS`` is a descriptor of memory for the weights (``shared.py``).

The api process starts it with one end of a socket pair. It leaves when that
socket closes, also while it is still loading, so it cannot outlive its parent, however the parent ends.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import NoReturn

import msgspec

from server.engine.memory import keep_pages
from server.engine.messages import Fatal, Progress, Ready, Reply, Request
from server.engine.wire import ChildSide
from server.errors import DeltaserveError

_Receive = Callable[[Request | None], None]


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
    queue_timeout_seconds: float = 0.0
    kv_bytes: int | None
    kv: str = "auto"
    cuda_graphs: bool = True
    delta_bytes: int
    host_delta_bytes: int
    pinned_delta_share: float = 0.5
    threads: int | None
    ops_mode: str | None = None

    @property
    def queue_timeout(self) -> float:
        """How long a row may wait, in seconds: infinite where the setting is 0."""
        return self.queue_timeout_seconds or float("inf")


def main() -> None:
    """Entry point of the child."""
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # a terminal's Ctrl-C goes to the whole group; the parent decides
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    side: ChildSide[Request, Reply] = ChildSide(socket.socket(fileno=int(sys.argv[1])), Request)
    weights = int(sys.argv[3]) if len(sys.argv) > 3 else None
    config = msgspec.json.decode(sys.argv[2].encode(), type=EngineConfig)
    receiver: Future[_Receive] = Future()
    threading.Thread(target=_read, args=(side, receiver), daemon=True, name="inbox").start()
    send = partial(_send, side)
    send(Progress("importing torch"))
    keep_pages()
    os.environ.setdefault("TQDM_DISABLE", "1")  # progress is reported through messages
    try:
        from server.engine import build

        engine = build.build(config, send, weights)
    except DeltaserveError as error:
        send(Fatal(error.message))
        sys.exit(2)
    receiver.set_result(engine.receive)
    send(Ready(engine.info))
    engine.run()
    _leave()


def _read(side: ChildSide[Request, Reply], receiver: Future[_Receive]) -> None:
    """Hands every request to the engine, once there is one, and then None: the api process is gone."""
    try:
        while (request := side.receive()) is not None:
            receiver.result()(request)
    except OSError:  # reset: it went with something of ours unread
        request = None
    if not receiver.done():
        _leave()
    receiver.result()(None)


def _send(side: ChildSide[Request, Reply], reply: Reply) -> None:
    try:
        side.send(reply)
    except (BrokenPipeError, ConnectionResetError):
        _leave()  # nobody is left to work for


def _leave() -> NoReturn:
    # loader threads may be inside native code; nothing of theirs needs an orderly end
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
