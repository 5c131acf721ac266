"""Request bodies of the generating routes. Strict: an unknown or unsupported field is refused by its name."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from server.types import CHAT_ROLES

MAX_N = 128
MAX_ROWS = 512  # of one request: n times its prompts
MAX_STOPS = 16
MAX_STOP_CHARS = 256
MAX_LOGPROBS = 20
MAX_LOGIT_BIAS = 1024
MAX_MESSAGES = 4096
MAX_SEED = 2**63
MAX_INPUTS = 2048  # of one request for embeddings or classes, as OpenAI has it

TokenId = Annotated[int, Field(ge=0, lt=2**31)]


class Strict(BaseModel):
    """Base of all bodies: no unknown fields, no conversions between JSON's types."""

    model_config = ConfigDict(extra="forbid", strict=True)


class StreamOptions(Strict):
    """OpenAI's; obfuscation is a padding that this server never adds."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class Prioritised(Strict):
    """What may be asked for before others of the same tenant. ``priority`` is vLLM's: lower goes first, 0 by default."""

    priority: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None


class SamplingFields(Prioritised):
    """How rows choose their tokens. ``None`` means the default everywhere, as OpenAI's clients send it."""

    max_tokens: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    min_tokens: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    seed: Annotated[int, Field(ge=-MAX_SEED, lt=MAX_SEED)] | None = None
    stop: list[str] | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=256)] | None = None
    ignore_eos: bool | None = None

    @field_validator("stop", mode="before")
    @classmethod
    def _stops(cls, value: Any) -> Any:
        stops = [value] if isinstance(value, str) else value
        if isinstance(stops, list):
            if len(stops) > MAX_STOPS:
                raise ValueError(f"at most {MAX_STOPS} stop strings are taken")
            if any(isinstance(stop, str) and not 0 < len(stop) <= MAX_STOP_CHARS for stop in stops):
                raise ValueError(f"a stop string has 1 to {MAX_STOP_CHARS} characters")
        return stops

    @field_validator("logit_bias")
    @classmethod
    def _token_keys(cls, value: dict[str, float] | None) -> dict[str, float] | None:
        if value is not None:
            if len(value) > MAX_LOGIT_BIAS:
                raise ValueError(f"at most {MAX_LOGIT_BIAS} tokens can be biased")
            if not all(key.isascii() and key.isdigit() and len(key) < 10 for key in value):
                raise ValueError("keys must be token ids")
        return value


class GenerationRequest(SamplingFields):
    """What chat and text completions share."""

    model: Annotated[str, Field(min_length=1, max_length=1024)]
    n: Annotated[int, Field(ge=1, le=MAX_N)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    return_token_ids: bool | None = None

    # Known to OpenAI's clients and without a bearing on the answer: taken and not used.
    user: str | None = None
    store: bool | None = None
    metadata: dict[str, Any] | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None

    @model_validator(mode="after")
    def _streaming(self) -> GenerationRequest:
        if self.stream_options is not None and not self.stream:
            raise ValueError("'stream_options' is only allowed when 'stream' is true")
        return self


class TextPart(Strict):
    """The one kind of content part that is served."""

    type: Literal["text"]
    text: str


class Message(Strict):
    """One chat message. ``content`` is text, or text parts, which are joined."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | None = None
    name: str | None = None
    # What the clients' own answer objects carry along when they are sent back.
    refusal: None = None
    audio: None = None
    function_call: None = None
    tool_calls: Annotated[list[Any], Field(max_length=0)] | None = None
    annotations: list[Any] | None = None

    @field_validator("content", mode="before")
    @classmethod
    def _join(cls, value: Any) -> Any:
        if not isinstance(value, list):
            return value
        texts = []
        for part in value:
            if not isinstance(part, dict) or part.get("type") != "text":
                raise ValueError("only content parts of type 'text' are served")
            texts.append(TextPart.model_validate(part).text)
        return "".join(texts)

    @model_validator(mode="after")
    def _needs_content(self) -> Message:
        if self.content is None and self.role != "assistant":
            raise ValueError("content is missing")
        return self

    def plain(self) -> dict[str, Any]:
        """As the chat template takes it."""
        return {"role": CHAT_ROLES[self.role], "content": self.content or ""}


class ResponseFormat(Strict):
    """Plain text is the only one served yet."""

    type: Literal["text"]


def listed_prompts(value: Any) -> Any:
    """A text, a list of token ids, or a list of either, as a list of prompts. Raises ValueError for anything else."""
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list):
        raise ValueError("must be a string, a list of strings, a list of token ids, or a list of those")
    if value and all(isinstance(item, int) and not isinstance(item, bool) for item in value):
        return [value]
    if not value or not (
        all(isinstance(item, str) for item in value) or all(isinstance(item, list) for item in value)
    ):
        raise ValueError("must hold strings, token ids, or lists of token ids, and at least one")
    return value


class ChatRequest(GenerationRequest):
    """``POST /v1/chat/completions``."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    response_format: ResponseFormat | None = None
    modalities: list[Literal["text"]] | None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    tool_choice: Literal["none"] | None = None
    parallel_tool_calls: bool | None = None
    prediction: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _consistent(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("'top_logprobs' needs 'logprobs' to be true")
        if self.max_tokens == 0:
            raise ValueError("'max_tokens' must be at least 1")
        return self


class CompletionRequest(GenerationRequest):
    """``POST /v1/completions``. ``prompt`` is normalised to a list of texts or of token id lists."""

    prompt: list[str | list[TokenId]]
    echo: bool | None = None
    best_of: int | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    suffix: None = None

    @field_validator("prompt", mode="before")
    @classmethod
    def _prompts(cls, value: Any) -> Any:
        return listed_prompts(value)

    @model_validator(mode="after")
    def _consistent(self) -> CompletionRequest:
        n = self.n or 1
        if self.best_of is not None and self.best_of != n:
            raise ValueError("'best_of' must equal 'n'")
        if n * len(self.prompt) > MAX_ROWS:
            raise ValueError(f"'n' times the number of prompts must be at most {MAX_ROWS}")
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("'max_tokens' may be 0 only with 'echo'")
        return self


class EncodingRequest(Prioritised):
    """What embeddings and classification share. ``input`` is normalised to a list of texts or of token id lists.

    ``truncate_prompt_tokens`` (vLLM's) cuts longer inputs at their end; -1 means to the model's limit.
    """

    model: Annotated[str, Field(min_length=1, max_length=1024)]
    input: Annotated[list[str | list[TokenId]], Field(max_length=MAX_INPUTS)]
    truncate_prompt_tokens: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    add_special_tokens: bool | None = None
    user: str | None = None

    @field_validator("input", mode="before")
    @classmethod
    def _inputs(cls, value: Any) -> Any:
        inputs = listed_prompts(value)
        if any(len(item) == 0 for item in inputs):
            raise ValueError("an input cannot be empty")
        return inputs

    @field_validator("truncate_prompt_tokens")
    @classmethod
    def _some_tokens(cls, value: int | None) -> int | None:
        if value == 0:
            raise ValueError("must be -1 or at least 1")
        return value


class EmbeddingRequest(EncodingRequest):
    """``POST /v1/embeddings``."""

    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Field(ge=1, lt=2**31)] | None = None


class ClassifyRequest(EncodingRequest):
    """``POST /classify``, as vLLM has it. ``use_activation`` false gives the head's outputs as they are."""

    use_activation: bool | None = None


class TokenizeRequest(Strict):
    """``POST /tokenize``, as vLLM has it: a prompt, or messages for the chat template."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)] | None = None
    add_special_tokens: bool = True
    add_generation_prompt: bool = True
    return_token_strs: bool | None = None

    @model_validator(mode="after")
    def _one_input(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either 'prompt' or 'messages'")
        return self


class DetokenizeRequest(Strict):
    """``POST /detokenize``, as vLLM has it."""

    model: str | None = None
    tokens: Annotated[list[TokenId], Field(max_length=1 << 20)]


class AliasRequest(Strict):
    """``PUT /v1/deltas/{name}/aliases/{alias}``."""

    version: Annotated[int, Field(ge=1, lt=2**53)]


class ResidencyRequest(Strict):
    """``PUT /v1/deltas/{name}/residency``."""

    tier: Literal["device", "host", "disk"]
    pinned: bool = False

    @model_validator(mode="after")
    def _pinned_somewhere(self) -> ResidencyRequest:
        if self.pinned and self.tier == "disk":
            raise ValueError(
                "'pinned' needs the tier 'device' or 'host': what is stored stays on the disk anyway"
            )
        return self


LimitName = Annotated[str, Field(min_length=1, max_length=64)]
LimitValue = Annotated[float, Field(ge=0, lt=1e18)]


class TenantRequest(Strict):
    """``POST /v1/tenants``."""

    name: Annotated[str, Field(min_length=1, max_length=128)]
    limits: Annotated[dict[LimitName, LimitValue], Field(max_length=32)] | None = None


class TenantPatch(Strict):
    """``PATCH /v1/tenants/{name}``: a limit of null is removed, one that is not named stays."""

    limits: Annotated[dict[LimitName, LimitValue | None], Field(max_length=32)]
