"""One request over HTTP, and what came of it, by this machine's clock."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass, field
from time import perf_counter
from typing import Literal

import httpx

from server.bench.plan import Request

State = Literal["succeeded", "failed", "cancelled"]


class _Failed(Exception):
    """The answer is an error or none; the argument is the code."""


@dataclass
class Outcome:
    """A request's times, in seconds of ``perf_counter``, and its counts.

    ``gaps`` are between single tokens: where several come at once they share the time since the ones before.
    Those that come with the first have none. ``code`` says why it failed: the server's error code, else
    ``http_`` and the status, ``timeout``, ``cannot_connect``, ``connection_lost``, ``bad_answer`` or
    ``stream_not_ended``.
    """

    request: Request
    sent: float
    late: float | None = None
    """How long after it was due it was sent; None where nothing says when requests are due."""
    ended: float = 0.0
    state: State | None = None
    code: str | None = None
    first: float | None = None
    """From sending to the first token, of a stream."""
    gaps: list[float] = field(default_factory=list)
    prompt_tokens: int = 0
    output_tokens: int = 0
    _last: float = 0.0

    @property
    def seconds(self) -> float:
        """From sending to the end of the answer."""
        return self.ended - self.sent

    def arrived(self, tokens: int, now: float) -> None:
        """Tokens of a stream came."""
        if self.first is None:
            self.first = now - self.sent
        else:
            self.gaps += [(now - self._last) / tokens] * tokens
        self._last = now
        self.output_tokens += tokens

    def fail(self, code: str) -> None:
        """It came to nothing."""
        self.state, self.code = "failed", code


async def ask(http: httpx.AsyncClient, outcome: Outcome, limit: float) -> None:
    """Send ``outcome.request`` and fill the outcome, within ``limit`` seconds. Raises only ``CancelledError``."""
    exchange = _stream if outcome.request.streamed else _whole
    try:
        async with asyncio.timeout(limit):
            await exchange(http, outcome)
        outcome.state = "succeeded"
    except asyncio.CancelledError:
        outcome.state = "cancelled"
        raise
    except _Failed as error:
        outcome.fail(str(error))
    except TimeoutError:
        outcome.fail("timeout")
    except httpx.ConnectError:
        outcome.fail("cannot_connect")
    except httpx.HTTPError:
        outcome.fail("connection_lost")
    except (ValueError, KeyError, TypeError):  # no JSON, or not what the contract says
        outcome.fail("bad_answer")
    finally:
        outcome.ended = perf_counter()


async def _whole(http: httpx.AsyncClient, outcome: Outcome) -> None:
    response = await http.post(outcome.request.path, json=outcome.request.body)
    _check(response)
    answer = response.json()
    outcome.prompt_tokens = answer["usage"]["prompt_tokens"]
    outcome.output_tokens = answer["usage"].get("completion_tokens", 0)
    for output in answer.get("outputs", ()):  # of a task, where an input can fail alone
        if "error" in output:
            raise _Failed(output["error"]["code"])


async def _stream(http: httpx.AsyncClient, outcome: Outcome) -> None:
    """What one read brings came at one time, whether as one event or as several."""
    done = False
    async with http.stream("POST", outcome.request.path, json=outcome.request.body) as response:
        if response.is_error:
            await response.aread()
            _check(response)
        tail = b""
        async for read in response.aiter_bytes():
            now = perf_counter()
            *events, tail = (tail + read).split(b"\n\n")
            tokens, code = 0, None
            for event in events:
                data = event.removeprefix(b"data: ")
                if data == b"[DONE]":
                    done = True
                    continue
                chunk = json.loads(data)
                if "error" in chunk:
                    code = str(chunk["error"]["code"])
                    continue
                tokens += sum(len(choice.get("token_ids") or ()) for choice in chunk["choices"])
                if chunk.get("usage"):
                    outcome.prompt_tokens = chunk["usage"]["prompt_tokens"]
            if tokens:
                outcome.arrived(tokens, now)
            if code is not None:
                raise _Failed(code)
    if not done:
        raise _Failed("stream_not_ended")


def _check(response: httpx.Response) -> None:
    """Raises for an error, with its code, or with its status where the body has none."""
    if not response.is_error:
        return
    try:
        code = str(response.json()["error"]["code"])
    except (ValueError, KeyError, TypeError):
        code = f"http_{response.status_code}"
    raise _Failed(code)
