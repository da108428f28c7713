"""Servers under test as child processes: started, refused, crashed, and gone afterwards."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kvloom.loadtest.client.servers import Server, StartError, answers, model_name, running

LISTEN = """
import http.server, json, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps({"data": [{"id": "m"}]}).encode())
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


def python(code: str) -> str:
    return shlex.join([sys.executable, "-c", code, "{port}"])


def test_a_server_runs_while_it_is_needed(tmp_path: Path) -> None:
    with running(Server("one", python(LISTEN)), tmp_path) as started:
        assert answers(started.url) and started.seconds is not None
        assert model_name(started.url) == "m"
    assert not answers(started.url)
    assert (tmp_path / "one.log").read_text().count("GET /health") >= 1


def test_a_server_is_stopped_when_the_measurement_fails(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), running(Server("one", python(LISTEN)), tmp_path) as started:
        raise KeyboardInterrupt
    assert not answers(started.url)


def test_a_server_does_not_outlive_a_terminated_measurement(tmp_path: Path) -> None:
    code = f"""
import time
from pathlib import Path
from kvloom.loadtest.client.servers import Server, running
with running(Server("one", {python(LISTEN)!r}), Path({str(tmp_path)!r})) as started:
    print(started.url, flush=True)
    time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as measurement:
        assert measurement.stdout is not None
        url = measurement.stdout.readline().strip()
        assert answers(url)
        measurement.terminate()
        assert measurement.wait(timeout=60) == 128 + signal.SIGTERM
    assert not answers(url)


def test_children_of_a_server_do_not_outlive_it(tmp_path: Path) -> None:
    child = f"import os, subprocess, sys; open('pid', 'w').write(str(subprocess.Popen(['sleep', '60']).pid)); {LISTEN!s}"
    folder = os.getcwd()
    os.chdir(tmp_path)
    try:
        with running(Server("one", python(child)), tmp_path):
            pid = int((tmp_path / "pid").read_text())
            os.kill(pid, 0)
    finally:
        os.chdir(folder)
    until = time.monotonic() + 60
    while lives(pid) and time.monotonic() < until:  # a killed process needs its turn on the processor to be gone
        time.sleep(0.02)
    assert not lives(pid)


def lives(pid: int) -> bool:
    """Whether a process runs: it is neither gone nor waits to be reaped."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize(("code", "refused"), [(2, True), (1, False)])
def test_a_server_that_ends_says_why(tmp_path: Path, code: int, refused: bool) -> None:
    text = f"import sys; print('first'); print('budget is wrong', file=sys.stderr); sys.exit({code})"
    with (
        pytest.raises(StartError, match=f"exit code {code}: budget is wrong") as caught,
        running(Server("x", python(text)), tmp_path),
    ):
        pass
    assert caught.value.refused is refused and caught.value.words == "budget is wrong"


def test_a_command_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(StartError, match="cannot be run"), running(Server("x", "no-such-command {port}"), tmp_path):
        pass


def test_a_server_at_a_url_is_left_alone(tmp_path: Path) -> None:
    with running(Server("x", url="http://127.0.0.1:9/"), tmp_path) as started:
        assert started == ("http://127.0.0.1:9", None, None)
