"""One row's life: what it is to compute, how far it has come, and where its keys and values are."""

from __future__ import annotations

from dataclasses import dataclass, field

from server.types import DeltaRef, SamplingParams


@dataclass(slots=True, eq=False)
class Sequence:
    """A row from its arrival to its end.

    Its tokens are ``prompt + output``. The newest output token has been sampled but has no keys and values
    yet: computing it is what the next step does. A row that lost its KV (``computed`` back at 0) simply
    computes prompt and output again.
    """

    id: int
    tenant: str
    prompt: list[int]
    sampling: SamplingParams
    delta: DeltaRef | None = None
    weight: float = 1.0  # the tenant's share
    priority: int = 0  # among its tenant's rows: lower goes first
    source: list[int] = field(default_factory=list)  # what an encoder-decoder's encoder reads; else empty
    output: list[int] = field(default_factory=list)
    prefix: int = (
        0  # tokens of KV that the delta's prompt or prefix puts before the row's own; known at admission
    )
    slot: int | None = None  # the row's place in the KV cache, while it runs
    computed: int = 0  # how many of prompt + output have keys and values
    copied_from: int | None = None  # the slot that had the first of them at admission (maybe its own), if any
    cached: int = 0  # how many those were
    charged: int = 0  # tokens that its tenant has been charged for, or need not be
    behind: Sequence | None = None  # the running row whose keys and values this one waits to share
    limit: int = field(init=False)  # most output tokens: max_tokens, clipped to the slot at admission
    arrived: float = 0.0  # seconds, monotonic clock
    started: float | None = None  # when it was first admitted

    def __post_init__(self) -> None:
        self.limit = self.sampling.max_tokens

    @property
    def length(self) -> int:
        """Tokens of prompt and output, without the delta's prefix."""
        return len(self.prompt) + len(self.output)

    @property
    def uncomputed(self) -> int:
        """Tokens that still need keys and values."""
        return self.length - self.computed

    @property
    def unread(self) -> int:
        """Tokens of its source that an encoder reads in the step in which the row begins."""
        return 0 if self.computed else len(self.source)

    @property
    def remaining(self) -> int:
        """How many more tokens may be sampled; at 0 the row ends with ``length`` once all is computed."""
        return self.limit - len(self.output)

    @property
    def decoding(self) -> bool:
        """Whether all that is left to compute is the newest output token."""
        return bool(self.output) and self.uncomputed == 1

    @property
    def last_token(self) -> int:
        """The newest token of prompt and output."""
        return self.output[-1] if self.output else self.prompt[-1]

    @property
    def digest(self) -> str:
        """The delta's digest, or the empty string for a base row (which sorts before every digest)."""
        return self.delta.digest if self.delta is not None else ""

    @property
    def held(self) -> int:
        """KV tokens that the row holds once all its tokens are computed, its delta's prefix and its source among them."""
        return self.prefix + self.length + len(self.source)

    def charge(self, count: int) -> int:
        """What its tenant is charged for a step of ``count`` tokens: nothing for tokens that are computed again."""
        new = max(0, self.computed + count - self.charged)
        read = 0 if self.charged else self.unread
        self.charged = max(self.charged, self.computed + count)
        return new + read

    def tokens(self, start: int, count: int) -> list[int]:
        """``count`` tokens of prompt and output from ``start`` on."""
        split = len(self.prompt)
        stop = start + count
        if start >= split:
            return self.output[start - split : stop - split]
        if stop <= split:
            return self.prompt[start:stop]
        return self.prompt[start:] + self.output[: stop - split]

    def advance(self, count: int, token: int | None = None) -> None:
        """Account for a step: ``count`` more tokens are computed, and ``token`` (if any) was sampled."""
        self.computed += count
        if token is not None:
            self.output.append(token)
