"""The tuner process: ``python -m server.tuning.process FD SETTINGS WEIGHTS``.

The settings are a :class:`TunerConfig` in JSON, ``WEIGHTS`` is the descriptor of the engine's weights
(``server.engine.shared``). It trains every job it was given, all together, and yields to the engine: by the operating
system's priority, and by a duty cycle where that does not reach (a GPU). It leaves when its socket closes.
"""

from __future__ import annotations

import os
import queue
import signal
import socket
import sys
import threading
from functools import partial
from pathlib import Path
from typing import Literal

import msgspec

from server.engine.memory import keep_pages
from server.engine.wire import ChildSide
from server.tuning.messages import FromTuner, ToTuner

Priority = Literal["idle", "low", "normal"]

_OUT_OF_MEMORY_FIRST = "1000"


class TunerConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What the tuner process needs of the settings.

    ``share`` is of its time, while the engine has rows to compute; None for 1 on a CPU, where the priority does it,
    and a half elsewhere.
    """

    priority: Priority
    threads: int | None
    share: float | None


def main() -> None:
    """Entry point of the child."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    side: ChildSide[ToTuner, FromTuner] = ChildSide(socket.socket(fileno=int(sys.argv[1])), ToTuner)
    config = msgspec.json.decode(sys.argv[2].encode(), type=TunerConfig)
    _yield_to_others(config.priority)  # before there are threads: each inherits it
    keep_pages()
    os.environ.setdefault("TQDM_DISABLE", "1")
    inbox: queue.SimpleQueue[ToTuner] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(side, inbox), daemon=True, name="inbox").start()
    from server.tuning.loop import Tuner  # seconds to import, at this process's priority

    Tuner(config, int(sys.argv[3]), inbox, partial(_send, side)).run()
    sys.stdout.flush()
    os._exit(0)


def _yield_to_others(priority: Priority) -> None:
    """The engine's threads come first, see ``sched(7)``; and in want of memory the kernel ends this process first."""
    if priority == "idle":
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    elif priority == "low":
        os.nice(19)
    Path("/proc/self/oom_score_adj").write_text(_OUT_OF_MEMORY_FIRST)


def _read(side: ChildSide[ToTuner, FromTuner], inbox: queue.SimpleQueue[ToTuner]) -> None:
    try:
        while (message := side.receive()) is not None:
            inbox.put(message)
    except OSError:  # reset: it went with something of ours unread
        pass
    os._exit(0)  # nobody is left to train for, and what is on disk is whole


def _send(side: ChildSide[ToTuner, FromTuner], message: FromTuner) -> None:
    try:
        side.send(message)
    except (BrokenPipeError, ConnectionResetError):
        os._exit(0)


if __name__ == "__main__":
    main()
