"""The dashboard and the alert rules, run by a real Prometheus on a real /metrics."""

from __future__ import annotations

import json
import re
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from server.metrics import Metrics
from tests.deploy.promserver import Prometheus, program

HERE = Path(__file__).resolve().parent
DEPLOY = HERE.parents[1] / "deploy"
DASHBOARD: dict[str, Any] = json.loads((DEPLOY / "grafana/dashboards/deltaserve.json").read_text())
PANELS: list[dict[str, Any]] = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
RULES = [
    rule
    for group in yaml.safe_load((DEPLOY / "prometheus/alerts.yml").read_text())["groups"]
    for rule in group["rules"]
]
# What Grafana puts in place of its variables.
VARIABLES = {"$__rate_interval": "10s", "$instance": ".*"}
SUFFIXES = ("_bucket", "_sum", "_count")
FRESH_SECONDS = 60.0

# One worker's work: the Prometheus is shared by the session.
pytestmark = pytest.mark.xdist_group("prometheus")


def _expressions() -> list[Any]:
    return [
        pytest.param(target["expr"], id=f"{panel['title']} {target['refId']}")
        for panel in PANELS
        for target in panel["targets"]
    ]


def _exported() -> set[str]:
    """Names of all families that the server exports, as queries name them."""
    return {
        family.name + ("_total" if family.type == "counter" else "")
        for family in Metrics().registry.collect()
    }


def _named(expression: str) -> set[str]:
    """Names of the families that an expression reads."""
    names = set()
    for name in re.findall(r"deltaserve_[a-z_]+", expression):
        family = next((name.removesuffix(end) for end in SUFFIXES if name.endswith(end)), name)
        names.add(family)
    return names


@pytest.mark.parametrize("expression", _expressions())
def test_every_panel_shows_something(prometheus: Prometheus, expression: str) -> None:
    for variable, value in VARIABLES.items():
        expression = expression.replace(variable, value)
    assert "$" not in expression
    result = prometheus.until_sampled(expression, FRESH_SECONDS)
    assert any(sample["value"][1] != "NaN" for sample in result), f"{expression} gave {result}"


def test_the_dashboard_s_variables_resolve(prometheus: Prometheus) -> None:
    source, instance = DASHBOARD["templating"]["list"]
    provisioned = yaml.safe_load((DEPLOY / "grafana/provisioning/datasources/prometheus.yml").read_text())
    (datasource,) = provisioned["datasources"]
    assert (source["name"], source["type"], source["query"]) == (
        "DS_PROMETHEUS",
        "datasource",
        datasource["type"],
    )
    assert source["current"]["value"] == datasource["uid"]
    metric = re.fullmatch(r"label_values\((\w+), instance\)", instance["query"]["query"])
    assert metric is not None
    (sample,) = prometheus.until_sampled(metric[1], FRESH_SECONDS)
    assert sample["metric"]["instance"]


def test_panels_are_well_formed() -> None:
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(ids)) == len(ids)
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, f"{panel['title']} lies over another panel"
        taken |= cells
    for panel in PANELS:
        assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
        for part in (panel, *panel["targets"]):
            assert part["datasource"] == {"type": "prometheus", "uid": "${DS_PROMETHEUS}"}, panel["title"]


def test_dashboard_and_alerts_read_what_the_server_exports() -> None:
    shown = {name for panel in PANELS for target in panel["targets"] for name in _named(target["expr"])}
    watched = {name for rule in RULES for name in _named(rule["expr"])}
    assert shown | watched <= _exported()
    assert _exported() <= shown, "a metric that no panel shows"


def test_the_configuration_passes_promtool(tmp_path: Path) -> None:
    command = [program("promtool"), "check", "config", str(DEPLOY / "prometheus/prometheus.yml")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_alerts_fire_when_they_should(tmp_path: Path) -> None:
    """Each alert on series that must raise it, and on series that must not: promtool plays them."""
    rules = yaml.safe_load((DEPLOY / "prometheus/alerts.yml").read_text())
    for rule in rules["groups"][0]["rules"]:
        del rule["annotations"]["description"]
    (tmp_path / "alerts.yml").write_text(yaml.safe_dump(rules))
    cases = tmp_path / "cases.yml"
    cases.write_bytes((HERE / "alerts_cases.yml").read_bytes())
    command = [program("promtool"), "test", "rules", str(cases)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_has_a_case_that_raises_it() -> None:
    cases = yaml.safe_load((HERE / "alerts_cases.yml").read_text())
    raised = {
        check["alertname"]
        for test in cases["tests"]
        for check in test["alert_rule_test"]
        if check.get("exp_alerts")
    }
    assert raised == {rule["alert"] for rule in RULES}


def test_a_running_prometheus_evaluates_every_alert(prometheus: Prometheus) -> None:
    deadline = time.monotonic() + FRESH_SECONDS
    while any(rule["health"] == "unknown" for rule in prometheus.rules()) and time.monotonic() < deadline:
        threading.Event().wait(0.25)
    assert {rule["name"]: rule["health"] for rule in prometheus.rules()} == {
        rule["alert"]: "ok" for rule in RULES
    }


def test_every_alert_tells_what_to_do() -> None:
    for rule in RULES:
        assert rule["labels"]["severity"] in ("critical", "warning"), rule["alert"]
        assert {"summary", "description"} <= rule["annotations"].keys(), rule["alert"]
