"""Steady, small traffic on a real server: two tenants, all kinds of deltas, uploads, and requests that are refused."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from pathlib import Path

import httpx

from tests.api.command import Server
from tests.tiny import KINDS

PAUSE_SECONDS = 0.2
SEEDS = 50  # a new delta each round for as long as that; Prometheus is done well before

Native = Callable[[str, int], Path]


class Traffic:
    """Rounds of requests on a thread, from ``start`` to ``stop``."""

    def __init__(self, server: Server, native_file: Native) -> None:
        self._server, self._native_file = server, native_file
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.error: BaseException | None = None

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Ends the rounds; raises what went wrong in them."""
        self._stop.set()
        self._thread.join()
        if self.error is not None:
            raise self.error

    def _run(self) -> None:
        try:
            with self._server.http() as admin:
                answer = admin.post("/v1/tenants", json={"name": "acme"})
                answer.raise_for_status()
                with self._server.http(answer.json()["key"]) as acme:
                    for turn in itertools.count():
                        for http in (admin, acme):
                            self._round(http, turn)
                        if self._stop.wait(PAUSE_SECONDS):
                            return
        except (httpx.HTTPError, AssertionError) as error:
            self.error = error

    def _round(self, http: httpx.Client, turn: int) -> None:
        kind = KINDS[turn % len(KINDS)]
        name = f"{kind}-{turn % SEEDS}"
        with self._native_file(kind, turn % SEEDS).open("rb") as file:
            answer = http.post("/v1/deltas", data={"name": name}, files={"file": ("delta.safetensors", file)})
        assert answer.status_code in (200, 201), answer.text
        for model in (name, "tiny"):
            body = {"model": model, "prompt": "Once upon a time", "max_tokens": 8, "stream": True}
            with http.stream("POST", "/v1/completions", json=body) as stream:
                assert "[DONE]" in stream.read().decode()
        assert http.get("/v1/models", headers={"authorization": "Bearer nobody"}).status_code == 401
        assert http.post("/v1/completions", json={"model": "nothing", "prompt": "x"}).status_code == 404
