"""Domain types that several layers share. Plain data, no behaviour beyond small derivations."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any, Literal, NamedTuple

import msgspec

DeltaStatus = Literal["ready", "quarantined", "deleted"]
Visibility = Literal["private", "public"]
Tier = Literal["device", "host", "disk"]
PinTier = Literal["device", "host"]
JobState = Literal["validating_files", "queued", "running", "paused", "succeeded", "failed", "cancelled"]

# A message's role as clients write it -> as chat templates know it.
CHAT_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}

DEFAULT_TENANT = "default"
LIVE = "live"


class DeltaRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One version of a tenant's delta: a name for a digest, with what listings show of it.

    ``bytes`` counts the tensors; ``rank`` is the largest rank or bottleneck width (None where there is none);
    ``created_at`` is in Unix seconds; ``status_reason`` says why a version is not ``ready``.
    """

    id: str
    tenant: str
    name: str
    version: int
    digest: str
    methods: list[str]
    format: str
    backbone: str
    parameters: int
    bytes: int
    rank: int | None
    sites: list[str]
    task_kind: str | None = None
    labels: list[str] | None = None
    status: DeltaStatus = "ready"
    status_reason: str | None = None
    visibility: Visibility = "private"
    created_at: int
    metadata: dict[str, str] = {}


class Tenant(msgspec.Struct, frozen=True, kw_only=True):
    """An owner. ``limits`` are stored as given; enforcement belongs to ``tenants/``."""

    name: str
    created_at: int
    limits: dict[str, float] = {}


class ApiKey(msgspec.Struct, frozen=True, kw_only=True):
    """A key as it is stored: never its secret. ``hint`` is the key's last four characters."""

    id: str
    tenant: str
    created_at: int
    hint: str


class Principal(msgspec.Struct, frozen=True, kw_only=True):
    """Who sent a request: the tenant it acts for, and whether by the admin key."""

    tenant: str
    admin: bool = False
    key_id: str | None = None


class Turn(msgspec.Struct, frozen=True):
    """Whose row it is, and when it has its turn: ``weight`` is the tenant's share of a busy engine, ``priority`` orders the
    tenant's own rows (lower goes first).
    """

    tenant: str
    weight: float = 1.0
    priority: int = 0


class Page(msgspec.Struct, frozen=True, kw_only=True):
    """One page of a listing, oldest first."""

    items: list[Any]
    has_more: bool


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True):
    """How one row chooses its tokens.

    ``temperature`` 0 is greedy; ``top_k`` 0 means all; ``repetition_penalty`` as in transformers (over prompt and
    output), presence and frequency as OpenAI's (over output). ``logprobs`` is how many alternatives to report
    with each token (0: the token's own only; None: nothing), ``prompt_logprobs`` the same for prompt tokens from
    index ``prompt_logprobs_from`` on. ``eos_token_ids`` end the row unless ``ignore_eos``; ``stop_token_ids`` always do
    once ``min_tokens`` are out.
    """

    max_tokens: int
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = {}
    seed: int | None = None
    stop_token_ids: list[int] = []
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    prompt_logprobs_from: int = 0


TaskKind = Literal["generate", "classify", "regress", "score", "embed", "tag"]


class Task(msgspec.Struct, frozen=True, kw_only=True):
    """A named inference endpoint of a tenant.

    ``template`` is a text, a pair of texts, or a chat's messages (``{"role", "content"}``); ``labels`` are names, or
    names with what stands for each. ``model`` is a name as requests give it, resolved at each use.
    """

    name: str
    kind: TaskKind
    model: str
    template: str | list[str | dict[str, str]] | None = None
    labels: list[str] | dict[str, list[str]] | None = None
    parameters: dict[str, Any] = {}
    created_at: int


class DeltaPart(msgspec.Struct, frozen=True):
    """One term of a sum: a delta's digest, the local file that holds its native form, and its weight."""

    digest: str
    path: str
    weight: float = 1.0


class DeltaRef(msgspec.Struct, frozen=True):
    """A delta as the engine needs it: which, and the local file that holds its native form; or a sum of several.

    A sum has ``parts``, in the order in which they apply, and no ``path``. Its digest names it in every cache, as a
    delta's own does; make it by :meth:`of_sum`.
    """

    digest: str
    path: str = ""
    parts: tuple[DeltaPart, ...] = ()

    @classmethod
    def of_sum(cls, parts: Iterable[DeltaPart]) -> DeltaRef:
        """The sum of these, its digest the sha256 of their digests and weights. Order counts: bottlenecks chain."""
        parts = tuple(parts)
        text = "".join(f"{part.digest}*{float(part.weight)!r}\n" for part in parts)
        return cls(hashlib.sha256(f"deltaserve sum\n{text}".encode()).hexdigest(), parts=parts)

    @property
    def summands(self) -> tuple[DeltaPart, ...]:
        """What is to be added up: the parts of a sum, a single delta by itself."""
        return self.parts or (DeltaPart(self.digest, self.path),)


ProbeOutcome = Literal["changes", "rounding", "nothing", "not_finite", "failed"]


class ProbeResult(msgspec.Struct, frozen=True):
    """What a delta did to the backbone's output in its first forward pass; ``message`` explains all but ``changes``.

    ``rounding``: it acts, but no logit of the probe moved. ``nothing``: it does not act. ``not_finite``: outputs become
    NaN or infinite. ``failed``: it cannot be computed here.
    """

    outcome: ProbeOutcome
    message: str = ""


class Residence(msgspec.Struct, frozen=True):
    """The highest tier that holds a delta, and the bytes that it takes there (0 on disk: the engine does not look)."""

    tier: Tier
    bytes: int


class TokenLogprob(msgspec.Struct, frozen=True):
    """One token's log-probability and the most likely alternatives, best first, as (token id, logprob)."""

    token: int
    logprob: float
    top: list[tuple[int, float]] = []


FinishReason = Literal["stop", "length"]


class TokenEvent(msgspec.Struct, frozen=True):
    """What one engine step gave one row: new token ids, and the end if it came.

    ``logprobs`` has one entry for each id if asked for. ``prompt_logprobs`` comes once, with the first event; its
    first entry is None, since nothing predicts the first token.
    """

    token_ids: list[int]
    logprobs: list[TokenLogprob] | None = None
    prompt_logprobs: list[TokenLogprob | None] | None = None
    finish_reason: FinishReason | None = None
    cached_tokens: int = 0


class TextPiece(NamedTuple):
    """A part of a text. ``own``: its writer may spell control tokens in it (a task's template, not a client's value)."""

    text: str
    own: bool


class BadRow(NamedTuple):
    """What is wrong with a row of a dataset, or (``line`` None) with the whole file. ``line`` counts from 1.

    ``file`` is ``training_file`` or ``validation_file``; ``field`` the row's key, as ``messages[2].content``.
    """

    file: str
    line: int | None
    field: str | None
    code: str
    message: str


class EncodedText(msgspec.Struct, frozen=True):
    """A text's token ids, or a pair's.

    ``types`` are token types where the backbone's tokenizer gives them. ``words`` has for each token its word's number
    and where in the text it lies, (word, first character, end): None for control tokens around the text, and for
    every token of a pair.
    """

    ids: list[int]
    types: list[int] | None
    words: list[tuple[int, int, int] | None]


class EncoderInput(msgspec.Struct, frozen=True):
    """One row for an encoder: token ids, their types (zeros where None), and the position of its ``mask`` if it has one."""

    ids: list[int]
    types: list[int] | None = None
    mask: int | None = None


class Want(msgspec.Struct, frozen=True):
    """What an encoder shall make of rows.

    ``embedding``: one vector, pooled and normalised as the backbone's files say unless ``pooling`` (``mean``, ``cls``,
    ``max``) or ``normalise`` say otherwise. ``head``: the outputs of the delta's head. ``tokens``: those of a head that
    gives some for every token. ``mask``: the logits of the tokens ``candidates`` at the row's mask.
    """

    kind: Literal["embedding", "head", "tokens", "mask"]
    pooling: str | None = None
    normalise: bool | None = None
    candidates: list[int] = []


class Vector(msgspec.Struct, frozen=True):
    """What an encoder made of one row: little-endian float32 ``values``; of ``tokens``, one line after another."""

    values: bytes
    lines: int = 1


class BackboneInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What the engine says of the backbone once it is resident. ``folder`` is in Hugging Face's layout.

    ``decoder_start`` are the tokens that an encoder-decoder's answers begin after; none for other kinds.
    """

    name: str
    folder: str
    family: str
    revision: str
    dtype: str
    device: str
    parameters: int
    max_model_len: int
    max_rows: int
    eos_token_ids: list[int]
    decoder_start: list[int] = []


class EngineStats(msgspec.Struct, frozen=True, kw_only=True):
    """Gauges and cumulative counts the engine reports, several times a second while it works."""

    rows_running: int = 0
    rows_waiting: int = 0
    kv_tokens_used: int = 0
    kv_tokens_total: int = 0
    deltas_device: int = 0
    deltas_host: int = 0
    delta_bytes_device: int = 0
    delta_bytes_host: int = 0
    preemptions: int = 0
    prefix_cache_queries: int = 0  # prompt tokens
    prefix_cache_hits: int = 0
    steps: int = 0
    loads_from_host: int = 0
    loads_from_disk: int = 0
    load_failures: int = 0
    quarantined: dict[str, str] = {}  # digest -> reason
    load_seconds: list[float] = []  # since the last report
    batch_rows: list[int] = []  # one entry a step since the last report
    batch_deltas: list[int] = []
    queue_seconds: list[float] = []
