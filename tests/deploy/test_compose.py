"""The compose files: the Compose Specification's schema, and what only this project can know of them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from server.config import unknown_variables

ROOT = Path(__file__).resolve().parents[2]
FILES = ("docker-compose.yml", "docker-compose.cuda.yml")
SCHEMA = json.loads((Path(__file__).parent / "compose-spec.json").read_text())


def _load(name: str) -> dict[str, Any]:
    compose: dict[str, Any] = yaml.safe_load((ROOT / name).read_text())
    return compose


COMPOSE = _load("docker-compose.yml")
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]


@pytest.mark.parametrize("name", FILES)
def test_the_file_is_valid(name: str) -> None:
    jsonschema.Draft7Validator(SCHEMA).validate(_load(name))


def test_the_schema_refuses_a_misspelt_key() -> None:
    with pytest.raises(jsonschema.ValidationError, match="helthcheck"):
        jsonschema.Draft7Validator(SCHEMA).validate({"services": {"a": {"image": "b", "helthcheck": {}}}})


def test_only_the_api_and_grafana_are_published_and_only_here() -> None:
    published = {name: service["ports"] for name, service in SERVICES.items() if "ports" in service}
    assert published == {"server": ["127.0.0.1:8000:8000"], "grafana": ["127.0.0.1:3000:3000"]}


def test_what_is_mounted_exists() -> None:
    for name, service in SERVICES.items():
        for volume in service["volumes"]:
            source, target = volume.split(":")[:2]
            assert target.startswith("/")
            if source.startswith("."):
                assert (ROOT / source).exists(), f"{name} mounts {source}"
            else:
                assert source in COMPOSE["volumes"], f"{name} uses a volume that is not declared: {source}"


def test_services_wait_for_what_can_be_waited_for() -> None:
    for name, service in SERVICES.items():
        for other, wait in service.get("depends_on", {}).items():
            if wait["condition"] == "service_healthy":
                assert "healthcheck" in SERVICES[other], (
                    f"{name} waits for {other}, which has no health check"
                )


def test_images_are_pinned() -> None:
    for name, service in SERVICES.items():
        assert re.search(r":v?\d+\.\d+", service["image"]) or "build" in service, name


def test_the_server_knows_its_settings() -> None:
    settings = SERVICES["server"]["environment"]
    assert unknown_variables({key: str(value) for key, value in settings.items()}) == []
    assert settings["DELTASERVE_REDIS_URL"] == "redis://redis:6379/0"


def test_redis_keeps_what_it_acknowledged() -> None:
    command = SERVICES["redis"]["command"]
    options = dict(zip(command[1::2], command[2::2], strict=True))
    assert options == {"--appendonly": "yes", "--appendfsync": "always", "--maxmemory-policy": "noeviction"}
    assert "redis-data:/data" in SERVICES["redis"]["volumes"]


def test_the_parts_find_each_other() -> None:
    """Names and ports that one file gives and another one uses."""
    scrape = yaml.safe_load((ROOT / "deploy/prometheus/prometheus.yml").read_text())["scrape_configs"]
    targets = {job["job_name"]: job["static_configs"][0]["targets"] for job in scrape}
    assert targets["deltaserve"] == ["server:8000"]
    assert SERVICES["server"]["environment"]["DELTASERVE_METRICS_OPEN"] == "true"

    grafana = ROOT / "deploy/grafana"
    (source,) = yaml.safe_load((grafana / "provisioning/datasources/prometheus.yml").read_text())[
        "datasources"
    ]
    assert source["url"] == "http://prometheus:9090"
    (provider,) = yaml.safe_load((grafana / "provisioning/dashboards/deltaserve.yml").read_text())[
        "providers"
    ]
    mounted = dict(volume.split(":")[1::-1] for volume in SERVICES["grafana"]["volumes"])
    assert mounted[provider["options"]["path"]] == "./deploy/grafana/dashboards"
    home = SERVICES["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert (grafana / "dashboards" / Path(home).name).exists()


def test_grafana_lets_nobody_in_without_a_password() -> None:
    environment = SERVICES["grafana"]["environment"]
    assert environment["GF_AUTH_ANONYMOUS_ENABLED"] == "false"
    assert environment["GF_SECURITY_ADMIN_PASSWORD"]
