"""``deltaserve tune`` and ``deltaserve jobs`` against a small server on a real socket."""

from __future__ import annotations

import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from server.cli import app
from tests.jobs_server import JOB, PATH, Jobs, event, serving, steps

runner = CliRunner()
MAIN = [sys.executable, "-c", "from server.cli import main; main()"]


@pytest.fixture
def jobs() -> Iterator[Jobs]:
    with serving(Jobs(streams=[[event(1, "The job is queued"), *steps(2, 4, 4)]])) as started:
        yield started


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a", "label": "b"}\n')
    return path


def environment(jobs: Jobs) -> dict[str, str]:
    return {"DELTASERVE_URL": jobs.url, "DELTASERVE_API_KEY": "key", "COLUMNS": "200"}


def run(jobs: Jobs, *arguments: str, code: int = 0) -> str:
    result = runner.invoke(app, list(arguments), env=environment(jobs))
    assert result.exit_code == code, result.output
    return " ".join(result.output.split())


def test_body_and_files(jobs: Jobs, rows: Path) -> None:
    output = run(
        jobs,
        *("tune", str(rows), "--name", "mine", "--method", "lora:alpha=4,targets=q+v", "--method", "bitfit"),
        *(
            "--valid",
            str(rows),
            "--task",
            "classify",
            "--labels",
            "b, a",
            "--epochs",
            "2",
            "--batch-size",
            "4",
        ),
        *("--learning-rate", "0.001", "--init-from", "other@3", "--template", "{text}!", "--patience", "2"),
        *("--seed", "5", "--max-length", "64"),
    )
    assert "ftjob-1 is queued" in output
    assert "deltaserve jobs follow ftjob-1" in output
    assert [b'name="purpose"' in upload and b"fine-tune" in upload for upload in jobs.uploads] == [True, True]
    assert jobs.bodies == [
        {
            "model": "base",
            "training_file": "file-1",
            "validation_file": "file-2",
            "seed": 5,
            "method": {
                "type": "supervised",
                "supervised": {"hyperparameters": {"n_epochs": 2, "batch_size": 4}},
            },
            "delta": {
                "name": "mine",
                "task": "classify",
                "methods": [
                    {"method": "lora", "alpha": 4, "targets": ["q", "v"]},
                    {"method": "bitfit"},
                ],
                "labels": ["b", "a"],
                "template": "{text}!",
                "learning_rate": 0.001,
                "max_length": 64,
                "init_from": "other@3",
                "early_stopping": {"patience": 2},
            },
        }
    ]


def test_rank_and_defaults(jobs: Jobs, rows: Path) -> None:
    run(jobs, "tune", str(rows), "--name", "mine", "--rank", "4", "--base", "other")
    assert jobs.bodies[0]["model"] == "other"
    assert jobs.bodies[0]["delta"] == {"name": "mine", "methods": [{"method": "lora", "rank": 4}]}
    two = ("--method", "lora", "--method", "ia3")
    assert "one --method" in run(jobs, "tune", str(rows), "--name", "x", "--rank", "4", *two, code=1)
    assert "OPTION=VALUE" in run(jobs, "tune", str(rows), "--name", "x", "--method", "lora:8", code=1)
    assert "No such file" in run(jobs, "tune", "nowhere", "--name", "x", code=1)


def test_follow_to_the_end(jobs: Jobs, rows: Path) -> None:
    output = run(jobs, "tune", str(rows), "--name", "mine", "--follow")
    assert "The job is queued" in output
    assert "Step 4/4: training loss=0.2500" in output
    assert "the model is mine" in output
    assert f"curl {jobs.url}/classify" in output
    assert '{"model": "mine", "input": "..."}' in output


def test_a_lost_stream_goes_on_where_it_broke_off(jobs: Jobs) -> None:
    jobs.streams = [
        [event(1, "The job is queued"), *steps(2, 2, 4), None],
        [503],
        [*steps(3, 3, 4), None],
        steps(4, 4, 4),
    ]
    output = run(jobs, "jobs", "follow", JOB)
    assert [output.count(f"Step {n}/4") for n in (2, 3, 4)] == [1, 1, 1]
    assert output.count("The job is queued") == 1
    assert jobs.resumed == [None, "ftevent-1-2", "ftevent-1-2", "ftevent-1-3"]


def test_failures_are_the_commands_own(jobs: Jobs) -> None:
    jobs.status, jobs.error = "failed", {"code": "tuner_crashed", "message": "out of memory", "param": None}
    assert "out of memory (tuner_crashed)" in run(jobs, "jobs", "follow", JOB, code=1)
    jobs.status, jobs.error = "cancelled", None
    assert "is cancelled" in run(jobs, "jobs", "follow", JOB, code=1)
    assert "no such job (404 not_found)" in run(jobs, "jobs", "follow", "ftjob-2", code=1)


def test_bad_rows_are_listed(jobs: Jobs, rows: Path) -> None:
    bad = {
        "file": "training_file",
        "line": 3,
        "field": "label",
        "code": "missing_field",
        "message": "no label",
    }
    jobs.refusal = {"message": "bad file", "code": "invalid_dataset", "rows": [bad], "report_file": "file-7"}
    output = run(jobs, "tune", str(rows), "--name", "mine", code=1)
    assert "bad file (400 invalid_dataset)" in output
    assert "training file, line 3, label: no label (missing_field)" in output
    assert "GET /v1/files/file-7/content" in output


def test_dry_run(jobs: Jobs, rows: Path) -> None:
    jobs.plan = {
        "object": "fine_tuning.job.dry_run",
        "tokens": 120,
        "steps": 3,
        "delta": {"labels": ["a", "b"]},
        "warnings": [
            {
                "file": "training_file",
                "code": "duplicate",
                "message": "the same row",
                "count": 2,
                "lines": [4, 5],
            }
        ],
    }
    output = run(jobs, "tune", str(rows), "--name", "mine", "--dry-run")
    assert jobs.bodies[0]["dry_run"] is True
    assert "tokens 120" in output
    assert "labels a, b" in output
    assert "training_file: 2 x the same row (lines 4, 5)" in output


def test_jobs(jobs: Jobs) -> None:
    output = run(jobs, "jobs", "ls")
    assert "ftjob-1 │ succeeded │ 4/4 │ mine" in output
    assert '"id": "ftjob-1"' in run(jobs, "jobs", "show", JOB)
    assert "will be paused" in run(jobs, "jobs", "pause", JOB)
    assert "is cancelled" in run(jobs, "jobs", "cancel", JOB)
    run(jobs, "jobs", "resume", JOB)
    assert [path for method, path in jobs.asked if method == "POST"] == [
        f"{PATH}/{what}" for what in ("pause", "cancel", "resume")
    ]


def test_ctrl_c_leaves_the_job_alone(jobs: Jobs) -> None:
    jobs.streams = [[event(1, "The job is queued"), ...]]
    with subprocess.Popen(
        [*MAIN, "jobs", "follow", JOB],
        env=os.environ | environment(jobs),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert "The job is queued" in process.stdout.readline()
        process.send_signal(signal.SIGINT)
        rest = process.stdout.read()
    assert process.returncode == 130
    assert f"deltaserve jobs cancel {JOB} --url {jobs.url}" in rest
    assert not any("cancel" in path for _, path in jobs.asked)


def test_a_terminal_shows_a_bar(jobs: Jobs) -> None:
    ours, theirs = pty.openpty()
    environ = os.environ | environment(jobs) | {"TERM": "xterm", "COLUMNS": "100", "LINES": "30"}
    process = subprocess.Popen([*MAIN, "jobs", "follow", JOB], env=environ, stdout=theirs, stderr=theirs)
    os.close(theirs)
    shown = b""
    until = time.monotonic() + 60
    while time.monotonic() < until and select.select([ours], [], [], 60)[0]:
        try:
            part = os.read(ours, 65_536)
        except OSError:  # what a terminal gives when its last writer has gone
            break
        shown += part
    os.close(ours)
    assert process.wait(30) == 0
    text = shown.decode()
    assert "step 4/4" in text
    assert "━" in text
    assert "loss 0.2500" in text
    assert "the model is" in text
