"""SmolLM2 behind the command line, and the stock ``openai`` client before it.

Twelve deltas of four kinds are pushed over HTTP by two tenants, and 32 streams run at the same time over them and the
backbone; then the server is started again on the same data folder, and they run once more.
"""

from __future__ import annotations

import asyncio
import re
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

import httpx
import openai
import pytest
import torch
from openai import AsyncOpenAI, OpenAI
from transformers import AutoConfig, AutoTokenizer

from deltas.backbones import describe
from deltas.formats import native
from tests.api.command import Server, serving
from tests.oracle.twelve import BITFITS, NAMES, bitfit_delta, source, teacher_forced

pytestmark = [pytest.mark.smollm2, pytest.mark.xdist_group("smollm2")]

TOKENS = 12
BASE = "smollm2"
QUESTIONS = [
    "Name a colour.",
    "What do bees make?",
    "Say hello in French.",
    "How many legs has a dog?",
    "Is ice cold?",
    "Who wrote Hamlet?",
    "What is 2 + 3?",
    "Name a river in Egypt.",
]
TENANTS = {"north": NAMES[0::2], "south": NAMES[1::2]}  # who pushes which: every kind on both sides


@dataclass(frozen=True)
class Ask:
    """One request."""

    tenant: str
    model: str
    question: str

    @property
    def messages(self) -> list[dict[str, str]]:
        return [{"role": "system", "content": "Be brief."}, {"role": "user", "content": self.question}]


@dataclass(frozen=True)
class Told:
    """What came back."""

    digest: str | None
    prompt_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    text: str
    finish_reason: str | None


def asks() -> list[Ask]:
    """32 requests, mixed: two for each delta, with different questions, and eight for the backbone."""
    owners = {name: tenant for tenant, names in TENANTS.items() for name in names}
    models = [*NAMES, *NAMES, *[BASE] * 8]
    made = [
        Ask(owners.get(model, [*TENANTS][i % 2]), model, QUESTIONS[i % len(QUESTIONS)])
        for i, model in enumerate(models)
    ]
    return [made[i * 7 % len(made)] for i in range(len(made))]


def upload(http: httpx.Client, name: str, folder: Path) -> str:
    """Push a delta as its library saved it; its digest."""
    parts = [("file", (path.name, path.read_bytes())) for path in sorted(folder.iterdir())]
    response = http.post("/v1/deltas", data={"name": name}, files=parts)
    assert response.status_code == 201, (name, response.text)
    return str(response.json()["digest"])


def push_all(
    server: Server, smollm2: Path, twelve: dict[str, Path], scratch: Path
) -> tuple[dict[str, str], dict[str, str]]:
    """Two tenants and their deltas: keys by tenant, digests by name."""
    spec = describe(AutoConfig.from_pretrained(smollm2), "any")
    keys, digests = {}, {}
    for tenant, names in TENANTS.items():
        with server.http() as admin:
            made = admin.post("/v1/tenants", json={"name": tenant})
            assert made.status_code == 201, made.text
            keys[tenant] = made.json()["key"]
        with server.http(keys[tenant]) as http:
            for name in names:
                folder = twelve.get(name, scratch / name)
                if name in BITFITS:
                    folder.mkdir()
                    native.save(bitfit_delta(smollm2, spec, name), folder / native.WEIGHTS)
                digests[name] = upload(http, name, folder)
    return keys, digests


def check_tenants(server: Server, keys: dict[str, str], digests: dict[str, str]) -> None:
    """Each tenant sees its own deltas; the other's are not there for it."""
    for tenant, others in (("north", TENANTS["south"]), ("south", TENANTS["north"])):
        with server.http(keys[tenant]) as http:
            listed = http.get("/v1/deltas?limit=100").json()["data"]
            assert [item["name"] for item in listed] == TENANTS[tenant]
            assert all(item["version"] == 1 and item["digest"] == digests[item["name"]] for item in listed)
            assert http.get(f"/v1/deltas/{others[0]}").status_code == 404
            assert http.get("/v1/tenants").status_code == 403
        with OpenAI(base_url=f"{server.url}/v1", api_key=keys[tenant], max_retries=0) as client:
            assert {model.id for model in client.models.list()} == {BASE, *TENANTS[tenant]}
            with pytest.raises(openai.NotFoundError) as refused:
                client.chat.completions.create(
                    model=others[0], messages=[{"role": "user", "content": "?"}], max_tokens=1
                )
            assert refused.value.code == "model_not_found"


async def tell(client: AsyncOpenAI, ask: Ask) -> Told:
    """One streamed chat completion."""
    raw = await client.chat.completions.with_raw_response.create(
        model=ask.model,
        messages=ask.messages,
        max_tokens=TOKENS,
        temperature=0,
        stream=True,
        extra_body={"return_token_ids": True},
    )
    prompt_ids: list[int] = []
    token_ids: list[int] = []
    text, finish_reason = "", None
    async for chunk in raw.parse():
        prompt_ids += getattr(chunk, "prompt_token_ids", None) or []
        (choice,) = chunk.choices
        token_ids += getattr(choice, "token_ids", None) or []
        text += choice.delta.content or ""
        assert finish_reason is None
        finish_reason = choice.finish_reason
    return Told(raw.headers.get("x-delta-digest"), tuple(prompt_ids), tuple(token_ids), text, finish_reason)


async def tell_all(server: Server, keys: dict[str, str], questions: list[Ask]) -> list[Told]:
    """All at the same time."""
    async with AsyncExitStack() as stack:
        clients = {
            tenant: await stack.enter_async_context(
                AsyncOpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0)
            )
            for tenant, key in keys.items()
        }
        return await asyncio.gather(*(tell(clients[ask.tenant], ask) for ask in questions))


def steps_above(server: Server, histogram: str, bound: int) -> int:
    """How many steps had more than ``bound`` of what the histogram counts."""
    with server.http() as http:
        text = http.get("/metrics").text
    name = f"deltaserve_{histogram}"
    counts = {
        edge: float(re.search(rf'^{name}_bucket{{le="{edge}"}} (\S+)$', text, re.MULTILINE)[1])  # type: ignore[index]
        for edge in (f"{bound}.0", r"\+Inf")
    }
    return round(counts[r"\+Inf"] - counts[f"{bound}.0"])


def check_answers(questions: list[Ask], told: list[Told], smollm2: Path, twelve: dict[str, Path]) -> None:
    """Every answer is its source's own greedy answer to the same words."""
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    for name in (BASE, *NAMES):
        with source(smollm2, twelve, name, torch.float32) as model:
            for ask, answer in zip(questions, told, strict=True):
                if ask.model != name:
                    continue
                prompt = tokenizer.apply_chat_template(
                    ask.messages, add_generation_prompt=True, return_dict=False
                )
                assert [*answer.prompt_ids] == prompt
                tokens = [*answer.token_ids]
                logits = teacher_forced(model, prompt, tokens)
                assert tokens == logits.argmax(-1).tolist(), ask
                ended = tokens[-1] == tokenizer.eos_token_id
                assert answer.finish_reason == ("stop" if ended else "length"), ask
                assert ended or len(tokens) == TOKENS, ask
                assert tokenizer.eos_token_id not in tokens[:-1]
                assert answer.text == tokenizer.decode(tokens, skip_special_tokens=True), ask


def test_32_streams_over_twelve_deltas_and_again(
    smollm2: Path, twelve: dict[str, Path], tmp_path: Path
) -> None:
    flags = ["--backbone", str(smollm2), "--backbone-name", BASE, "--dtype", "float32", "--threads", "1"]
    questions = asks()
    assert len(questions) == 32
    with serving(tmp_path / "data", *flags) as server:
        keys, digests = push_all(server, smollm2, twelve, tmp_path)
        assert len({*digests.values()}) == 12
        check_tenants(server, keys, digests)
        told = asyncio.run(tell_all(server, keys, questions))
        assert [answer.digest for answer in told] == [digests.get(ask.model) for ask in questions]
        assert steps_above(server, "batch_rows", 16)
        assert steps_above(server, "batch_deltas", 8)
        assert server.terminate() == 0
    with serving(tmp_path / "data", *flags) as server:
        check_tenants(server, keys, digests)
        assert asyncio.run(tell_all(server, keys, questions)) == told
        assert server.terminate() == 0
    check_answers(questions, told, smollm2, twelve)


def test_the_default_backbone(tmp_path: Path) -> None:
    """Nothing but a data folder given: the weights come from the package, the registry is embedded."""
    with serving(tmp_path / "data") as server:
        assert server.valkey.alive
        with OpenAI(base_url=f"{server.url}/v1", api_key=server.key, max_retries=0) as client:
            (model,) = client.models.list()
            answer = client.chat.completions.create(
                model=model.id,
                messages=[
                    {"role": "user", "content": "What is the capital of France? Answer in one sentence."}
                ],
                max_tokens=16,
                temperature=0,
            )
            assert "Paris" in str(answer.choices[0].message.content)
        assert server.terminate() == 0
