from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from server.tenants.secrets import admin_key, server_secret


def test_made_once_and_private(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "data"
    secret = server_secret(folder)
    key, path = admin_key(folder)
    assert len(secret) == 32
    assert key.startswith("ds-admin-")
    assert path == folder / "admin.key"
    assert path.read_text().strip() == key
    assert server_secret(folder) == secret
    assert admin_key(folder) == (key, path)
    for name in ("hmac.key", "admin.key"):
        assert (folder / name).stat().st_mode & 0o777 == 0o600
    assert sorted(file.name for file in folder.iterdir()) == ["admin.key", "hmac.key"]
    assert server_secret(tmp_path / "other") != secret


def test_of_many_at_once_all_see_the_same(tmp_path: Path) -> None:
    with ThreadPoolExecutor(16) as pool:
        assert len(set(pool.map(server_secret, [tmp_path] * 64))) == 1
        assert len(set(pool.map(admin_key, [tmp_path] * 64))) == 1


@pytest.mark.parametrize("content", [b"", b"short", b"x" * 33])
def test_a_damaged_secret_is_not_replaced(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "hmac.key").write_bytes(content)
    with pytest.raises(OSError, match="is damaged"):
        server_secret(tmp_path)
    assert (tmp_path / "hmac.key").read_bytes() == content


def test_an_empty_admin_key_is_no_key(tmp_path: Path) -> None:
    (tmp_path / "admin.key").write_text("\n")
    with pytest.raises(OSError, match="is empty"):
        admin_key(tmp_path)
