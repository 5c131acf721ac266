"""Secrets that the server makes for itself, once, in its data folder: files of mode 0600."""

from __future__ import annotations

import secrets
from pathlib import Path

from server.store.durable import create_file, make_folder
from server.store.tenants import KEY_PREFIX

_SECRET_BYTES = 32


def server_secret(data_dir: Path) -> bytes:
    """The secret under which API keys are hashed, from ``hmac.key``: 32 bytes, made at the first start.

    Without this file no tenant key is known any more. Raises OSError when it cannot be read or is damaged.
    """
    path = data_dir / "hmac.key"
    if not path.exists():
        make_folder(data_dir)
        create_file(path, secrets.token_bytes(_SECRET_BYTES))
    secret = path.read_bytes()
    if len(secret) != _SECRET_BYTES:
        raise OSError(
            f"{path} is damaged: it must hold {_SECRET_BYTES} bytes. Restore it, or remove it, which "
            "makes all tenant keys invalid"
        )
    return secret


def admin_key(data_dir: Path) -> tuple[str, Path]:
    """The admin key that was made at the first start, and the file ``admin.key`` where it stands.

    Raises OSError when it cannot be read or is empty.
    """
    path = data_dir / "admin.key"
    if not path.exists():
        make_folder(data_dir)
        create_file(path, f"{KEY_PREFIX}admin-{secrets.token_urlsafe(_SECRET_BYTES)}\n".encode())
    key = path.read_text(encoding="utf-8").strip()
    if not key:
        raise OSError(f"{path} is empty: remove it to have a new admin key made")
    return key, path
