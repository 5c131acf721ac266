"""``deltaserve serve``: its options are the fields of ``Settings``, so that flags and variables cannot
diverge.
"""

from __future__ import annotations

import asyncio
import inspect
import os
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import typer
import uvloop
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from server import logging
from server.api.address import bind
from server.config import ENV_PREFIX, Settings, describe, unknown_variables


def _options() -> list[inspect.Parameter]:
    """One option a setting. Values are handed on as text: ``Settings`` converts and checks them, whatever
    their way.
    """
    return [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=None,
            annotation=_annotation(name, info),
        )
        for name, info in Settings.model_fields.items()
    ]


def _annotation(name: str, info: FieldInfo) -> Any:
    flag = f"--{name.replace('_', '-')}"
    default = "" if info.default is None else f"default: {info.default}; "
    text = f"{info.description} ({default}{ENV_PREFIX}{name.upper()})"
    if info.annotation is bool:
        option = typer.Option(f"{flag}/--no-{flag[2:]}", help=text, show_default=False)
        return _optional(bool, option)
    return _optional(str, typer.Option(flag, help=text, metavar=_metavar(info), show_default=False))


def _optional(kind: type, option: Any) -> Any:
    from typing import Annotated, Optional

    return Annotated[Optional[kind], option]  # noqa: UP045 - built at run time


def _metavar(info: FieldInfo) -> str:
    kinds = [kind for kind in get_args(info.annotation) if kind is not type(None)]
    if kinds and all(isinstance(kind, str) for kind in kinds):
        return "|".join(kinds)
    kind = kinds[0] if kinds else info.annotation
    return {int: "N", float: "SECONDS", Path: "PATH"}.get(kind, "TEXT") if isinstance(kind, type) else "TEXT"


def settings_from(given: dict[str, Any], environ: dict[str, str]) -> Settings:
    """Settings from flags and environment. Raises ``SystemExit`` 2 with one line per mistake."""
    unknown = unknown_variables(environ)
    if unknown:
        typer.secho(f"unknown setting: {', '.join(unknown)}", err=True, fg="red")
        raise SystemExit(2)
    try:
        return Settings(**{name: value for name, value in given.items() if value is not None})
    except ValidationError as error:
        typer.secho(describe(error), err=True, fg="red")
        raise SystemExit(2) from None


def _command(**given: Any) -> None:
    settings = settings_from(given, dict(os.environ))
    try:
        bound = bind(settings.host, settings.port)
    except OSError as error:
        _fail(str(error))
    logging.configure(settings.log_level)
    with bound:
        from server.api.serve import serve  # imports torch and the rest, which no other command needs

        address = _address(settings.host, bound.getsockname()[1])

        def on_ready(backbone: Any) -> None:
            typer.echo(banner(settings, address, backbone.info, encoder=backbone.spec.kind == "encoder"))

        typer.echo(f"deltaserve listens on {address} and loads {settings.backbone}")
        try:
            failure = uvloop.run(serve(settings, bound, on_ready))
        except asyncio.CancelledError:
            return  # a signal while the store was being opened: nothing was running
        except OSError as error:
            _fail(str(error))
    if failure is not None:
        _fail(failure)


def banner(settings: Settings, address: str, info: Any, *, encoder: bool = False) -> str:
    """What is printed once the server is ready: what it serves, where the key is, and a request to try."""
    if settings.admin_key is None:
        path = settings.data_dir / "admin.key"
        where, key = f"admin key: {path} (keep it to yourself)", f"$(cat {shlex.quote(str(path))})"
    else:
        where, key = "admin key: the one you gave", f"${ENV_PREFIX}ADMIN_KEY"
    route, body = "chat/completions", '"messages": [{"role": "user", "content": "Say hello."}]'
    if encoder:
        route, body = "embeddings", '"input": "Say hello."'
    body = f'{{"model": "{info.name}", {body}}}'
    return "\n".join(
        (
            f"ready: {info.name} ({info.parameters / 1e6:.0f} M parameters, {info.dtype}, {info.device}) "
            f"on {address}",
            where,
            "try:",
            f'  curl {address}/v1/{route} -H "authorization: Bearer {key}" '
            f"-H 'content-type: application/json' -d {shlex.quote(body)}",
        )
    )


def _address(host: str, port: int) -> str:
    unspecified = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}  # noqa: S104 - what to print, not to bind
    reachable = unspecified.get(host, f"[{host}]" if ":" in host else host)
    return f"http://{reachable}:{port}"


def _fail(message: str) -> Any:
    typer.secho(f"deltaserve: {message}", err=True, fg="red")
    raise SystemExit(1)


def _build() -> Callable[..., None]:
    def command(**given: Any) -> None:
        _command(**given)

    command.__signature__ = inspect.Signature(_options())  # type: ignore[attr-defined]
    return command


command = _build()
