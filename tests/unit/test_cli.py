"""The command line: options that are the settings, and client commands against a real server."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from server.cli import app
from server.cli.delta import files_of
from server.cli.serve import banner, settings_from
from server.config import Settings
from tests.api.fakes import INFO
from tests.api.running import ADMIN, Running, lora_files, running

runner = CliRunner()


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No setting and no key from outside."""
    for name in ("URL", "API_KEY", "BACKBONE", "DATA_DIR", "PORT"):
        monkeypatch.delenv(f"DELTASERVE_{name}", raising=False)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with running(tmp_path_factory.mktemp("cli")) as started:
        yield started


def run(server: Running, *arguments: str, code: int = 0) -> str:
    result = runner.invoke(
        app, list(arguments), env={"DELTASERVE_URL": server.url, "DELTASERVE_API_KEY": ADMIN}
    )
    assert result.exit_code == code, result.output
    return " ".join(result.output.split())


def test_every_setting_is_a_flag() -> None:
    result = runner.invoke(app, ["serve", "--help"], terminal_width=200)
    assert result.exit_code == 0
    for name in Settings.model_fields:
        assert f"--{name.replace('_', '-')}" in result.output
        assert f"DELTASERVE_{name.upper()}" in result.output


def test_flags_and_environment(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("DELTASERVE_PORT", "9")
    monkeypatch.setenv("DELTASERVE_MAX_ROWS", "8")
    settings = settings_from({"port": "10", "metrics_open": True, "host": None}, {})
    assert (settings.port, settings.max_rows, settings.metrics_open) == (10, 8, True)
    with pytest.raises(SystemExit) as stopped:
        settings_from({"port": "many", "device": "tpu"}, {})
    assert stopped.value.code == 2
    shown = capsys.readouterr().err
    assert "--port (DELTASERVE_PORT)" in shown
    assert "--device (DELTASERVE_DEVICE)" in shown
    with pytest.raises(SystemExit):
        settings_from({}, {"DELTASERVE_PROT": "1"})
    assert "DELTASERVE_PROT" in capsys.readouterr().err


def test_unknown_flags_are_errors() -> None:
    assert runner.invoke(app, ["serve", "--prot", "1"]).exit_code == 2


def test_banner_names_key_and_request(tmp_path: Path) -> None:
    folder = tmp_path / "my data"
    text = banner(Settings(data_dir=folder), "http://127.0.0.1:8000", INFO)
    assert str(folder / "admin.key") in text
    assert f"$(cat '{folder}/admin.key')" in text
    assert INFO.name in text
    encoder = banner(Settings(data_dir=folder), "http://127.0.0.1:8000", INFO, encoder=True)
    assert "/v1/embeddings" in encoder
    assert "chat" not in encoder
    given = banner(Settings(admin_key="secret"), "http://127.0.0.1:8000", INFO)
    assert "secret" not in given


def test_version() -> None:
    result = runner.invoke(app, ["--version"])
    assert result.exit_code == 0
    assert result.output.startswith("deltaserve ")


def test_deltas(server: Running, tmp_path: Path) -> None:
    lora_files(tmp_path / "one")
    lora_files(tmp_path / "two", seed=1)
    assert "mood@1 created: lora" in run(server, "delta", "push", str(tmp_path / "one"), "--name", "mood")
    assert "already there" in run(server, "delta", "push", str(tmp_path / "one"), "--name", "mood")
    second = [str(path) for path in (tmp_path / "two").iterdir()]
    assert "mood@2" in run(server, "delta", "push", *second, "--name", "mood", "--no-promote", "--public")
    listed = run(server, "delta", "ls")
    assert "mood" in listed
    assert "live" in listed
    shown = run(server, "delta", "show", "mood")
    assert "digest" in shown
    run(server, "delta", "alias", "mood", "live", "2")
    assert server.services is not None
    assert "mood@2: disk" in run(server, "delta", "residency", "mood")
    assert "mood@1: device, pinned" in run(
        server, "delta", "residency", "mood@1", "--tier", "device", "--pin"
    )
    assert "mood@1: host, pinned" in run(server, "delta", "residency", "mood@1", "--tier", "host")
    assert "mood@1: host, 1000 B" in run(server, "delta", "residency", "mood@1", "--unpin")
    assert "'device' or 'host'" in run(server, "delta", "residency", "mood", "--pin", code=1)
    run(server, "delta", "rm", "mood@1")
    run(server, "delta", "rm", "mood")
    assert "does not exist" in run(server, "delta", "show", "mood", code=1)
    assert "not a version" in run(server, "delta", "rm", "mood@live", code=1)


def test_errors_are_plain(server: Running, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    shown = run(server, "delta", "push", str(tmp_path / "adapter_config.json"), "--name", "x", code=1)
    assert "invalid_delta" in shown
    assert "Traceback" not in shown
    assert "does not exist" in run(server, "delta", "push", str(tmp_path / "nowhere"), "--name", "x", code=1)
    result = runner.invoke(app, ["delta", "ls", "--url", server.url, "--key", "ds-wrong"])
    assert result.exit_code == 1
    assert "invalid_api_key" in result.output
    result = runner.invoke(app, ["delta", "ls", "--url", "http://127.0.0.1:1", "--key", "x"])
    assert result.exit_code == 1
    assert "cannot reach" in result.output


def test_keys_default_to_the_data_folder(server: Running, tmp_path: Path) -> None:
    result = runner.invoke(app, ["delta", "ls", "--url", server.url])
    assert result.exit_code == 1
    assert "no key" in result.output
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "admin.key").write_text(f"{ADMIN}\n")
    assert runner.invoke(app, ["delta", "ls", "--url", server.url]).exit_code == 0


def test_tenants_and_keys(server: Running) -> None:
    made = run(server, "tenant", "create", "acme", "--limit", "weight=2")
    key = made.split()[-1]
    assert key.startswith("ds-")
    assert runner.invoke(app, ["delta", "ls", "--url", server.url, "--key", key]).exit_code == 0
    assert '"weight": 2.0' in run(server, "tenant", "ls")
    more = run(server, "keys", "create", "acme")
    listed = run(server, "keys", "ls", "acme")
    assert more.split()[-1][-4:] in listed
    key_id = re.findall(r"key-[0-9a-f]+", more)[0]
    run(server, "keys", "rm", "acme", key_id)
    assert key_id not in run(server, "keys", "ls", "acme")
    assert (
        "permission_denied" in runner.invoke(app, ["tenant", "ls", "--url", server.url, "--key", key]).output
    )
    run(server, "tenant", "rm", "acme")
    assert "not LIMIT=NUMBER" in run(server, "tenant", "create", "x", "--limit", "weight=much", code=1)


def test_folders_are_taken_flat(tmp_path: Path) -> None:
    for name in ("a.json", ".hidden"):
        (tmp_path / name).write_text("x")
    (tmp_path / "inner").mkdir()
    assert files_of([tmp_path]) == [tmp_path / "a.json"]
