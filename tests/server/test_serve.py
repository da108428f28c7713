"""The life of a server process: what it prints, signals, drain, engine death, exit codes."""

import contextlib
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest

from kvloom.server import probe

SCRIPT = Path(__file__).with_name("fake_process.py")


class Process:
    """A server in a process of its own. Its stderr is read all the time and kept."""

    def __init__(self, *flags, step=0.01, port=0):
        command = [sys.executable, str(SCRIPT), str(step), "--port", str(port), *flags]
        self.popen = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        self.lines = []
        self._ready = threading.Event()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self):
        for line in self.popen.stderr:
            self.lines.append(line)
            if line.startswith("Try:"):
                self._ready.set()
        self._ready.set()

    @property
    def stderr(self):
        return "".join(self.lines)

    def url(self):
        assert self._ready.wait(30)
        match = re.search(r"http://127\.0\.0\.1:\d+", self.stderr)
        assert match, self.stderr
        return match[0]

    def end(self):
        code = self.popen.wait(30)
        self._reader.join(10)
        return code


@pytest.fixture
def start():
    with contextlib.ExitStack() as stack:

        def begin(*flags, **options):
            process = Process(*flags, **options)
            stack.callback(process.end)
            stack.callback(process.popen.kill)
            return process

        yield begin


BODY = {"prompt": "hello", "stream": True}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_loading_ends_the_process_whatever_its_threads_do(start, number):
    process = start("endless")
    while "loading weights" not in process.stderr:
        time.sleep(0.02)
    process.popen.send_signal(number)
    assert process.end() == 130
    assert process.lines[-1] == "kvloom: interrupted while loading\n"


def test_banner_curl_and_clean_end(start):
    process = start("--served-model-name", "x")
    url = process.url()
    assert httpx.get(url + "/health").status_code == 200
    process.popen.send_signal(signal.SIGINT)
    assert process.end() == 0
    assert "loading weights" in process.stderr and "1600 tokens" in process.stderr and "echo-model" in process.stderr
    curl = next(line for line in process.lines if line.strip().startswith("curl "))
    body = json.loads(re.search(r"-d '(.*)'", curl)[1])
    assert body["model"] == "echo-model" and f"{url}/v1/chat/completions" in curl
    assert "Traceback" not in process.stderr


def test_sigterm_lets_requests_finish(start):
    process = start(step=0.02)
    url = process.url()
    with httpx.stream("POST", url + "/v1/completions", json={**BODY, "max_tokens": 40}, timeout=30) as response:
        lines = response.iter_lines()
        next(lines)
        process.popen.send_signal(signal.SIGTERM)
        rest = [line for line in lines if line]
    assert rest[-1] == "data: [DONE]" and json.loads(rest[-2][6:])["choices"][0]["finish_reason"] == "length"
    assert process.end() == 0


def test_drain_has_an_end(start):
    process = start("--drain-seconds", "0.3")
    url = process.url()
    with httpx.stream("POST", url + "/v1/completions", json={**BODY, "max_tokens": 4000}, timeout=30) as response:
        lines = response.iter_lines()
        next(lines)
        process.popen.send_signal(signal.SIGTERM)
        rest = [line for line in lines if line]
    assert rest[-1] == "data: [DONE]" and json.loads(rest[-2][6:])["error"]["message"]
    assert process.end() == 0


def test_requests_that_have_not_come_whole_are_not_waited_for(start, until):
    process = start("--drain-seconds", "1000")
    port = int(process.url().rsplit(":", 1)[1])
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 500\r\n\r\n"
    with contextlib.ExitStack() as stack:
        halves = [stack.enter_context(socket.create_connection(("127.0.0.1", port))) for _ in range(3)]
        for half, sent in zip(halves, (b"", b"GET /he", head + b'{"mo')):
            half.sendall(sent)
        assert httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200  # by now the others have arrived
        process.popen.send_signal(signal.SIGTERM)
        assert process.end() == 0
        assert halves[2].recv(100).startswith(b"HTTP/1.1 503")
    assert "Traceback" not in process.stderr and "still run" not in process.stderr


def test_who_does_not_read_is_cut_off_after_the_drain(start):
    process = start("--drain-seconds", "0.2", step=0.0)
    port = int(process.url().rsplit(":", 1)[1])
    body = json.dumps({**BODY, "max_tokens": 4000, "n": 8}).encode()
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(("127.0.0.1", port))
        client.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n")
        client.sendall(b"Content-Length: %d\r\n\r\n" % len(body) + body)
        assert client.recv(1)
        process.popen.send_signal(signal.SIGTERM)
        assert process.end() == 0
    assert "Traceback" not in process.stderr and "exceeded" not in process.stderr


def test_second_signal_ends_at_once(start, until):
    process = start("--drain-seconds", "1000")
    url = process.url()
    with contextlib.suppress(httpx.HTTPError), httpx.stream(
        "POST", url + "/v1/completions", json={**BODY, "max_tokens": 4000}, timeout=30
    ) as response:  # fmt: skip
        lines = response.iter_lines()  # kept: dropping it would close the connection
        next(lines)
        process.popen.send_signal(signal.SIGINT)
        until(lambda: "shutting down" in process.stderr)
        process.popen.send_signal(signal.SIGINT)
        assert process.end() == 128 + signal.SIGINT


def test_engine_death_ends_the_process(start):
    process = start()
    url = process.url()
    answer = httpx.post(url + "/v1/completions", json={"prompt": "die"}, timeout=30)
    assert answer.status_code == 503 and "told to die" in answer.json()["error"]["message"]
    assert httpx.get(url + "/health").status_code == 503
    assert process.end() == 70
    assert "told to die" in process.stderr and "Traceback" not in process.stderr


def test_port_in_use_is_one_line(start):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        process = start(port=taken.getsockname()[1])
        assert process.end() == 1
    assert len(process.lines) == 1 and "cannot listen on 127.0.0.1 port" in process.stderr


def test_model_not_found_is_one_line(start):
    process = start("absent")
    assert process.end() == 1
    assert process.stderr == "kvloom: there is no model 'absent'\n"


@pytest.mark.parametrize(
    ("flags", "message"),
    [(("--host", "203.0.113.7"), "cannot listen on 203.0.113.7"), (("--host", "no such host"), "host is 'no such host'"),
     (("--ssl-certfile", __file__, "--ssl-keyfile", __file__), "TLS certificate")],
)  # fmt: skip
def test_bad_addresses_and_certificates(start, flags, message):
    process = start(*flags)
    assert process.end() == 1
    assert message in process.lines[-1] and "Traceback" not in process.stderr


def test_the_probe_of_images_tells_a_healthy_server_from_none(start, monkeypatch, capsys):
    process = start()
    port = process.url().rsplit(":", 1)[1]
    monkeypatch.setenv("KVLOOM_PORT", port)
    monkeypatch.setenv("KVLOOM_HOST", "0.0.0.0")
    assert probe.main() == 0
    process.popen.send_signal(signal.SIGTERM)
    assert process.end() == 0
    assert probe.main() == 1 and f"no answer from 127.0.0.1 port {port}" in capsys.readouterr().err
