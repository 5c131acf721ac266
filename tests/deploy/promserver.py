"""A real Prometheus on the loopback, running the configuration that `deploy/` ships against one target."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

CONFIG = Path(__file__).resolve().parents[2] / "deploy" / "prometheus"
START_SECONDS = 30.0
POLL_SECONDS = 0.25


@dataclass(frozen=True)
class Target:
    """What is scraped: ``host:port``, and the bearer key if ``/metrics`` wants one."""

    address: str
    key: str | None = None


def program(name: str) -> str:
    """Path of ``prometheus`` or ``promtool``. Without it the test skips, but fails in CI."""
    path = shutil.which(name)
    if path is not None:
        return path
    message = f"{name} is not installed (Debian: apt-get install prometheus)"
    if os.environ.get("CI") == "true":
        pytest.fail(message)
    pytest.skip(message)


@dataclass(frozen=True)
class Prometheus:
    """A running Prometheus."""

    client: httpx.Client

    def query(self, expression: str) -> list[dict[str, Any]]:
        """Evaluate now; an error of Prometheus' is an assertion error that quotes it."""
        answer = self.client.get("/api/v1/query", params={"query": expression}).json()
        assert answer["status"] == "success", f"{expression}: {answer.get('error')}"
        result: list[dict[str, Any]] = answer["data"]["result"]
        return result

    def until_sampled(self, expression: str, seconds: float) -> list[dict[str, Any]]:
        """Evaluate until there is a number (a rate needs two scrapes; NaN is none), or time is up."""
        deadline = time.monotonic() + seconds
        while not has_number(result := self.query(expression)) and time.monotonic() < deadline:
            threading.Event().wait(POLL_SECONDS)
        return result

    def rules(self) -> list[dict[str, Any]]:
        """The alert rules, with their state and health."""
        groups = self.client.get("/api/v1/rules").json()["data"]["groups"]
        return [rule for group in groups for rule in group["rules"]]


def has_number(result: list[dict[str, Any]]) -> bool:
    """Whether an instant vector holds a sample that is not NaN."""
    return any(sample["value"][1] != "NaN" for sample in result)


def _configure(folder: Path, target: Target) -> Path:
    """The shipped configuration with the target replaced and scraping sped up."""
    config = yaml.safe_load((CONFIG / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    (job,) = (job for job in config["scrape_configs"] if job["job_name"] == "deltaserve")
    job["static_configs"] = [{"targets": [target.address]}]
    if target.key is not None:
        job["authorization"] = {"credentials": target.key}
    config["scrape_configs"] = [job]
    for rules in config["rule_files"]:
        shutil.copy(CONFIG / rules, folder / rules)
    path = folder / "prometheus.yml"
    path.write_text(yaml.safe_dump(config))
    return path


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def running(folder: Path, target: Target) -> Iterator[Prometheus]:
    """Start Prometheus with its data in ``folder``, wait until it is ready, and stop it at the end."""
    address = f"127.0.0.1:{_free_port()}"
    log = folder / "prometheus.log"
    command = [
        program("prometheus"),
        f"--config.file={_configure(folder, target)}",
        f"--storage.tsdb.path={folder / 'tsdb'}",
        f"--web.listen-address={address}",
        "--log.level=warn",
    ]
    with (
        log.open("wb") as output,
        subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT) as process,
        httpx.Client(base_url=f"http://{address}", timeout=10.0, trust_env=False) as client,
    ):
        try:
            _wait_ready(client, process, log)
            yield Prometheus(client)
        finally:
            process.terminate()
            process.wait(timeout=START_SECONDS)


def _wait_ready(client: httpx.Client, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        try:
            if client.get("/-/ready").status_code == 200:
                return
        except httpx.TransportError:
            pass  # it does not listen yet
        threading.Event().wait(POLL_SECONDS)
    raise AssertionError(f"prometheus did not get ready:\n{log.read_text()}")
