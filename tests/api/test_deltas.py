"""Uploads, versions, aliases, content, deletion; and requests that name deltas."""

from __future__ import annotations

import io
import json
import os
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from server.errors import DeltaRefused
from server.types import EngineStats
from tests.api.fakes import NAME
from tests.api.running import Running, lora_files, push

# CONTRACT.md's delta object, and why its status is not "ready"
FIELDS = {
    *("id", "object", "name", "version", "digest", "methods", "format", "backbone", "parameters", "bytes"),
    *(
        "rank",
        "sites",
        "task_kind",
        "labels",
        "status",
        "status_reason",
        "aliases",
        "visibility",
        "created_at",
        "metadata",
    ),
}


@pytest.fixture
def tenant(server: Running) -> Iterator[httpx.Client]:
    """A client with a fresh tenant's key."""
    name = f"t-{os.urandom(6).hex()}"
    with server.client() as admin:
        key = admin.post("/v1/tenants", json={"name": name}).json()["key"]
    with server.client(key, params={}) as client:
        yield client


def test_life_of_a_delta(tenant: httpx.Client, server: Running, tmp_path: Path) -> None:
    first = push(
        tenant, lora_files(tmp_path / "a"), name="mood", metadata='{"run": "7"}', visibility="private"
    )
    assert first.status_code == 201, first.text
    one = first.json()
    assert set(one) == FIELDS
    assert (one["object"], one["name"], one["version"], one["aliases"]) == ("delta", "mood", 1, ["live"])
    assert (one["methods"], one["format"], one["rank"], one["backbone"]) == (["lora"], "peft", 2, NAME)
    assert (one["parameters"], one["status"], one["metadata"]) == (64, "ready", {"run": "7"})
    assert one["sites"] == ["layers.0.attn.q"]

    again = push(tenant, lora_files(tmp_path / "a"), name="mood")
    assert (again.status_code, again.json()["version"]) == (200, 1)

    two = push(tenant, lora_files(tmp_path / "b", seed=1), name="mood", promote="false").json()
    assert (two["version"], two["aliases"]) == (2, [])
    assert tenant.get("/v1/deltas/mood").json() == one
    versions = tenant.get("/v1/deltas/mood/versions").json()
    assert [item["version"] for item in versions["data"]] == [1, 2]
    assert tenant.get("/v1/deltas/mood/versions/2").json() == two

    with server.client() as admin:
        scraped = admin.get("/metrics").text
    size = sum(path.stat().st_size for path in server.services.settings.data_dir.rglob("*.safetensors"))
    assert f'deltaserve_delta_bytes{{tier="disk"}} {float(size)}' in scraped

    moved = tenant.put("/v1/deltas/mood/aliases/live", json={"version": 2}).json()
    assert (moved["version"], moved["aliases"]) == (2, ["live"])
    assert tenant.put("/v1/deltas/mood/aliases/live", json={"version": 3}).status_code == 404
    assert tenant.put("/v1/deltas/mood/aliases/7", json={"version": 1}).status_code == 400

    for model, digest in (
        ("mood", two["digest"]),
        ("mood@1", one["digest"]),
        ("mood@live", two["digest"]),
    ):
        body = {"model": model, "messages": [{"role": "user", "content": "x"}]}
        for stream in (False, True):
            answer = tenant.post("/v1/chat/completions", json={**body, "stream": stream})
            assert answer.headers["x-delta-digest"] == digest
        call = server.engine.calls[-1]
        assert call.delta is not None
        assert call.delta.digest == digest
        assert Path(call.delta.path).is_file()
    models = tenant.get("/v1/models").json()["data"]
    assert [(m["id"], m["root"], m["parent"]) for m in models] == [
        (NAME, NAME, None),
        ("mood", NAME, NAME),
    ]
    assert tenant.get("/v1/models/mood@1").json()["id"] == "mood@1"

    gone = tenant.delete("/v1/deltas/mood/versions/2")
    assert gone.json() == {"id": "mood@2", "object": "delta", "deleted": True}
    assert server.engine.dropped == [two["digest"]]
    assert tenant.get("/v1/deltas/mood").json()["version"] == 1
    assert tenant.delete("/v1/deltas/mood").status_code == 200
    assert tenant.delete("/v1/deltas/mood").status_code == 404
    assert not server.services.blobs.path(one["digest"]).exists()
    assert tenant.get("/v1/deltas").json() == {"object": "list", "data": [], "has_more": False}
    assert list(server.services.upload_folder.iterdir()) == []


def test_content_can_be_pushed_again(tenant: httpx.Client, tmp_path: Path) -> None:
    made = push(tenant, lora_files(tmp_path / "a"), name="a").json()
    answer = tenant.get("/v1/deltas/a/versions/1/content")
    assert answer.headers["content-type"] == "application/x-tar"
    assert answer.headers["x-delta-digest"] == made["digest"]
    with tarfile.open(fileobj=io.BytesIO(answer.content)) as archive:
        assert archive.getnames() == ["delta.safetensors"]
    path = tmp_path / "a.tar"
    path.write_bytes(answer.content)
    same = push(tenant, {"a.tar": path}, name="b")
    assert (same.status_code, same.json()["digest"]) == (201, made["digest"])
    assert tenant.get("/v1/deltas/a/versions/9/content").status_code == 404


def archives(folder: Path) -> dict[str, Path]:
    files = lora_files(folder / "files")
    with zipfile.ZipFile(folder / "d.zip", "w", zipfile.ZIP_DEFLATED) as zipped:
        zipped.mkdir("inner")
        for name, path in files.items():
            zipped.write(path, f"inner/{name}")
    for suffix, mode in (("tar", "w"), ("tar.gz", "w:gz")):
        with tarfile.open(folder / f"d.{suffix}", mode) as tar:  # type: ignore[call-overload]
            tar.add(folder / "files", "inner")
    return {name: folder / name for name in ("d.zip", "d.tar", "d.tar.gz")}


def test_archives_give_the_same_delta(tenant: httpx.Client, tmp_path: Path) -> None:
    plain = push(tenant, lora_files(tmp_path / "plain"), name="a").json()
    for name, path in archives(tmp_path).items():
        answer = push(tenant, {name: path}, name="a")
        assert (answer.status_code, answer.json().get("digest")) == (200, plain["digest"]), answer.text
    mixed = push(tenant, {**archives(tmp_path), **lora_files(tmp_path / "plain")}, name="a")
    assert mixed.status_code == 400


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({}, "name"),
        ({"name": ""}, "name"),
        ({"name": "a/b"}, "name"),
        ({"name": NAME}, "name"),
        ({"name": "a", "promote": "maybe"}, "promote"),
        ({"name": "a", "visibility": "secret"}, "visibility"),
        ({"name": "a", "metadata": "["}, "metadata"),
        ({"name": "a", "metadata": '{"a": 1}'}, "metadata"),
        ({"name": "a", "colour": "red"}, "colour"),
    ],
)
def test_bad_fields(tenant: httpx.Client, tmp_path: Path, fields: dict[str, str], param: str) -> None:
    answer = push(tenant, lora_files(tmp_path), **fields)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param
    assert tenant.get("/v1/deltas").json()["data"] == []


def test_bad_deltas(tenant: httpx.Client, server: Running, tmp_path: Path) -> None:
    files = lora_files(tmp_path / "a")
    only_config = {"adapter_config.json": files["adapter_config.json"]}
    answer = push(tenant, only_config, name="a")
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_delta")
    files["adapter_model.safetensors"].write_bytes(b"\xff" * 100)
    answer = push(tenant, files, name="a")
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_delta")
    assert answer.json()["error"]["param"]
    server.engine.load_failure = DeltaRefused("too large for the device")
    answer = push(tenant, lora_files(tmp_path / "b"), name="a")
    assert (answer.status_code, answer.json()["error"]["message"]) == (400, "too large for the device")
    assert tenant.get("/v1/deltas").json()["data"] == []
    assert tenant.post("/v1/deltas", data={"name": "a"}).status_code == 400
    assert tenant.post("/v1/deltas", json={"name": "a"}).status_code == 400


def test_bad_multipart(tenant: httpx.Client) -> None:
    kind = {"content-type": "multipart/form-data; boundary=b"}
    part = b'--b\r\nContent-Disposition: form-data; name="file"; filename="x"\r\n\r\n'
    for content in (
        b"",
        b"nonsense",
        part + b"cut short",
        b"--b\r\nContent-Disposition: form-data\r\n\r\nx\r\n--b--\r\n",
        part + b"1\r\n" + part + b"2\r\n--b--\r\n",
        part.replace(b'"x"', b'".."') + b"1\r\n--b--\r\n",
        part.replace(b'"x"', b'""') + b"1\r\n--b--\r\n",
        part.replace(b'"file"', b'"files"') + b"1\r\n--b--\r\n",
    ):
        answer = tenant.post("/v1/deltas", content=content, headers=kind)
        assert answer.status_code == 400, (content, answer.text)


def test_idempotency_key(tenant: httpx.Client, server: Running, tmp_path: Path) -> None:
    files = lora_files(tmp_path / "a")
    parts = [("file", (name, path.read_bytes())) for name, path in files.items()]

    def post(name: str) -> httpx.Response:
        headers = {"idempotency-key": "once"}
        return tenant.post("/v1/deltas", data={"name": name}, files=parts, headers=headers)

    first = post("a")
    second = post("a")  # another boundary, the same content
    assert (first.status_code, second.status_code) == (201, 201)
    assert first.json() == second.json()
    other = post("b")
    assert other.status_code == 409
    assert other.headers["x-should-retry"] == "false"


def test_tenants_do_not_see_each_other(tenant: httpx.Client, http: httpx.Client, tmp_path: Path) -> None:
    mine = push(tenant, lora_files(tmp_path), name="private-one").json()
    for path in (
        "/v1/deltas/private-one",
        "/v1/deltas/private-one/versions",
        "/v1/deltas/private-one/versions/1",
        "/v1/deltas/private-one/versions/1/content",
        "/v1/models/private-one",
    ):
        assert http.get(path).status_code == 404, path
        assert tenant.get(path).status_code == 200, path
    assert http.delete("/v1/deltas/private-one").status_code == 404
    assert http.put("/v1/deltas/private-one/aliases/live", json={"version": 1}).status_code == 404
    theirs = push(http, lora_files(tmp_path), name="shared-content").json()
    assert theirs["digest"] == mine["digest"]
    assert http.delete("/v1/deltas/shared-content").status_code == 200
    assert tenant.get("/v1/deltas/private-one/versions/1/content").status_code == 200


def test_quarantine(tenant: httpx.Client, server: Running, tmp_path: Path) -> None:
    made = push(tenant, lora_files(tmp_path, seed=5), name="bad").json()
    take = server.engine.on_stats
    assert take is not None
    server.call(lambda: take(EngineStats(quarantined={made["digest"]: "a row was odd"})))
    body = {"model": "bad", "messages": [{"role": "user", "content": "x"}]}
    for _ in range(100):
        answer = tenant.post("/v1/chat/completions", json=body)
        if answer.status_code == 409:
            break
    error = answer.json()["error"]
    assert (error["code"], error["message"]) == (
        "delta_quarantined",
        "The delta 'bad' is quarantined: a row was odd.",
    )
    shown = made | {"status": "quarantined", "status_reason": "a row was odd"}
    for path in ("/v1/deltas/bad", "/v1/deltas/bad/versions/1"):
        assert tenant.get(path).json() == shown
    for path in ("/v1/deltas", "/v1/deltas/bad/versions"):
        assert tenant.get(path).json()["data"] == [shown]
    again = push(tenant, lora_files(tmp_path, seed=5), name="bad")
    assert (again.status_code, again.json()) == (200, shown)
    assert tenant.delete("/v1/deltas/bad").status_code == 200
    anew = push(tenant, lora_files(tmp_path, seed=5), name="bad").json()
    assert (anew["status"], anew["status_reason"]) == ("ready", None)


def test_paging(tenant: httpx.Client, tmp_path: Path) -> None:
    for index in range(3):
        push(tenant, lora_files(tmp_path, seed=9), name=f"d{index}")
    page = tenant.get("/v1/deltas?limit=2").json()
    assert [item["name"] for item in page["data"]] == ["d0", "d1"]
    assert page["has_more"]
    page = tenant.get("/v1/deltas?limit=2&after=d1").json()
    assert [item["name"] for item in page["data"]] == ["d2"]
    assert not page["has_more"]


def test_tenants(http: httpx.Client, server: Running, tmp_path: Path) -> None:
    made = http.post("/v1/tenants", json={"name": "acme", "limits": {"weight": 2}})
    assert made.status_code == 201
    assert made.json()["limits"] == {"weight": 2.0}
    assert http.post("/v1/tenants", json={"name": "acme"}).status_code == 409
    assert http.post("/v1/tenants", json={"name": "a:b"}).status_code == 400
    assert http.post("/v1/tenants", json={"name": "x", "color": 1}).json()["error"]["param"] == "color"
    patched = http.patch("/v1/tenants/acme", json={"limits": {"deltas": 3, "weight": None}})
    assert patched.json()["limits"] == {"deltas": 3.0}
    assert "acme" in [item["name"] for item in http.get("/v1/tenants?limit=100").json()["data"]]
    key = http.post("/v1/tenants/acme/keys").json()
    listed = http.get("/v1/tenants/acme/keys").json()["data"]
    assert [item["id"] for item in listed] == [made.json()["key_id"], key["id"]]
    assert key["key"] not in json.dumps(listed)
    with server.client(key["key"]) as client:
        digest = push(client, lora_files(tmp_path, seed=11), name="d").json()["digest"]
        assert client.get("/v1/deltas").status_code == 200
        assert http.delete(f"/v1/tenants/acme/keys/{key['id']}").status_code == 200
        assert client.get("/v1/deltas").status_code == 401
    assert http.delete("/v1/tenants/acme").status_code == 200
    assert http.get("/v1/tenants/acme").status_code == 404
    assert server.engine.dropped == [digest]
    assert http.delete("/v1/tenants/default").status_code == 409


def test_a_key_is_shown_once(http: httpx.Client) -> None:
    headers = {"idempotency-key": "k1"}
    first = http.post("/v1/tenants", json={"name": "once"}, headers=headers)
    assert first.status_code == 201
    again = http.post("/v1/tenants", json={"name": "once"}, headers=headers)
    assert again.status_code == 409
    assert first.json()["key"] not in again.text
    assert again.headers["x-should-retry"] == "false"
