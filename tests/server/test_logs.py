"""--log-format json: one object a line, whoever logs."""

import json
import logging
import re
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from kvloom.server import logs

SCRIPT = Path(__file__).with_name("fake_process.py")


@pytest.fixture
def formatter():
    return logs.JsonFormatter()


def record(message, *args, level=logging.INFO, exc_info=None, **more):
    return logging.getLogger("kvloom.test").makeRecord("kvloom.test", level, __file__, 1, message, args, exc_info, **more)


def test_a_record_is_one_line_of_json(formatter):
    line = formatter.format(record("%s tokens\nand \u2028more", 5, extra=logs.fields(prompt_tokens=5, error=None)))
    assert len(line.splitlines()) == 1
    told = json.loads(line)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", told.pop("time"))
    assert told == {"level": "info", "logger": "kvloom.test", "message": "5 tokens\nand \u2028more", "prompt_tokens": 5}


def test_a_traceback_is_a_field(formatter):
    try:
        raise RuntimeError("torn")
    except RuntimeError:
        line = formatter.format(
            record("failed", level=logging.ERROR, exc_info=sys.exc_info(), extra=logs.fields(odd=Path("a")))
        )
    told = json.loads(line)
    assert len(line.splitlines()) == 1 and "RuntimeError: torn" in told["exception"]
    assert told["odd"] == "a" and told["level"] == "error"


def test_a_server_logs_nothing_but_json():
    command = [sys.executable, str(SCRIPT), "0", "--port", "0", "--log-format", "json"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    lines = []
    try:
        while not any("kvloom serves" in line for line in lines):
            lines.append(process.stderr.readline())
            assert lines[-1], lines
        url = json.loads(lines[-1])["url"]
        headers = {"X-Request-Id": "mine"}
        with httpx.Client(base_url=url, headers=headers) as client:
            client.post("/v1/completions", json={"prompt": "confidential", "max_tokens": 3})
            client.post("/v1/completions", json={"prompt": "confidential", "max_tokens": -3})
        process.terminate()
        lines += process.stderr.readlines()
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.stderr.close()
    told = [json.loads(line) for line in lines]
    assert all({"time", "level", "logger", "message"} <= set(one) for one in told)
    assert told[0]["message"] == "loading weights" and not any("confidential" in line for line in lines)
    served, refused = (one for one in told if one.get("request_id") == "mine")
    assert (served["completion_tokens"], served["finish_reason"]) == (3, "length") and served["ttft_seconds"] >= 0
    assert (refused["status"], refused["error"], refused["path"]) == (400, "invalid_request_error", "/v1/completions")
    assert any(one["message"].startswith("shutting down") for one in told)


def test_a_start_that_fails_is_a_record_too():
    command = [sys.executable, str(SCRIPT), "0", "absent", "--port", "0", "--log-format", "json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    (told,) = map(json.loads, done.stderr.splitlines())
    assert told["level"] == "critical" and told["message"].startswith("there is no model")
