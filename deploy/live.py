"""`docker compose up`, as `deploy/check.py live` looks at it: a server and Prometheus in a project of their own, kvloom-check.

Needs a Docker daemon, the image (with the built-in model brought along: --build-arg MODEL=smollm2), Prometheus's, and the ports
8000 and 9090 of loopback. Everything that is started is taken away again. Nothing leaves this machine.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import tempfile
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from check import COMPOSE, FOLDER, Wrong, call, compose_program, queries, require, tool

SERVER, PROMETHEUS = "http://127.0.0.1:8000", "http://127.0.0.1:9090"
HEALTHY_SECONDS, STOP_SECONDS, ALERT_SECONDS = 20.0, 5.0, 90.0
VARIANT = "x86-64-v3"
PATHS = {"chat": "/v1/chat/completions", "text": "/v1/completions"}
DOCUMENT = "\n".join(f"Article {n}: the keeper of lamp {n} lights it at dusk, trims it at {n % 12} and writes {n * 7} into the "
                     "book of the harbour, which nobody has read for years." for n in range(1, 40))  # fmt: skip
OVERRIDES = """
services:
  server:
    environment:
      KVLOOM_REUSE: approx
      KVLOOM_KVSHARE_OPTIONS: '{"verified": true, "shadow_share": 1.0, "shadow_kl": 1000, "shadow_top1": 0}'
      KVLOOM_SHADOW_INTERVAL: "4"
"""
TENANTS = "tenants:\n  acme: {weight: 2, api_keys: [key-of-acme]}\n  apex: {api_keys: [key-of-apex]}\n"


class Project:
    """The services, with keys of their own."""

    def __init__(self, image: str, folder: Path) -> None:
        self.image, self._folder = image, folder
        call("sh", FOLDER / "secrets.sh", folder)
        (folder / "tenants.yaml").write_text(TENANTS)
        (folder / "override.yaml").write_text(OVERRIDES)
        self.key = (folder / "api_key").read_text()
        self.env = {"KVLOOM_SECRETS": str(folder), "KVLOOM_IMAGE": image, "COMPOSE_DISABLE_ENV_FILE": "1"}
        self._files = [word for file in (*COMPOSE, folder / "override.yaml") for word in ("-f", str(file))]

    def compose(self, *words: str, timeout: float = 120, **env: str) -> str:
        """What docker compose prints. Raises Wrong if it fails."""
        command = (compose_program(), "--project-name", "kvloom-check", *self._files, *words)
        return call(*command, env={**self.env, **env}, timeout=timeout)

    def ask(self, path: str, body: dict[str, Any], key: str = "") -> Any:
        """The answer to a request, read whole. Raises urllib's errors."""
        with urllib.request.urlopen(self.request(path, body, key), timeout=120) as response:
            return json.load(response)

    def request(self, path: str, body: dict[str, Any], key: str = "") -> urllib.request.Request:
        """A request with a key."""
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key or self.key}"}
        return urllib.request.Request(SERVER + path, json.dumps({"model": "smollm2", **body}).encode(), headers)


@contextlib.contextmanager
def project(image: str) -> Iterator[Project]:
    """A project that nothing is left of."""
    with tempfile.TemporaryDirectory() as folder:
        made = Project(image, Path(folder))
        try:
            yield made
        finally:
            made.compose("--profile", "*", "down", "--volumes", "--timeout", "5")  # the load test's report, too


def checks(image: str, bare: str | None, bench: str | None, wheels: str | None) -> Iterator[Callable[[], str]]:
    """The checks, in order: one begins where the last one left the services."""
    with project(image) as made:
        yield lambda: up(made)
        yield lambda: chat(made)
        yield lambda: call_and_schema(made)
        yield lambda: panels(made)
        yield lambda: stream_ends_whole(made)
        yield lambda: alert_fires()
        yield lambda: up(made)
        if bench is not None:
            yield lambda: load_test(made, bench)
        yield lambda: stops_idle(made)
        yield lambda: wrong_key_file(made)
        yield lambda: wrong_port(made)
    yield lambda: other_processor(image)
    yield lambda: second_start_offline(bare or image, wheels)


def up(made: Project) -> str:
    """Server and Prometheus are healthy soon."""
    began = time.monotonic()
    made.compose("up", "--no-build", "--detach", "--wait", "--wait-timeout", "120", "server", "prometheus")
    took = time.monotonic() - began
    require(took <= HEALTHY_SECONDS, f"healthy after {took:.1f} s; at most {HEALTHY_SECONDS:g}")
    return f"server and Prometheus healthy after {took:.1f} s"


def chat(made: Project) -> str:
    """A question is answered, and only with a key."""
    answer = made.ask(PATHS["chat"], {"messages": [{"role": "user", "content": "What is the capital of Japan?"}]})
    text = answer["choices"][0]["message"]["content"]
    require("Tokyo" in text, f"the answer is {text!r}")
    with contextlib.suppress(urllib.error.HTTPError):
        made.ask(PATHS["chat"], {"messages": [{"role": "user", "content": "Hello?"}]}, key="wrong")
        raise Wrong("a wrong key is served")
    return f"a chat is answered: {text}"


def call_and_schema(made: Project) -> str:
    """A tool that must be called is called with arguments of its schema, and an answer is of the schema that was asked for."""
    schema = {"type": "object", "properties": {"city": {"enum": ["Kyoto", "Bonn"]}, "days": {"enum": [1, 2]}},
              "required": ["city", "days"], "additionalProperties": False}  # fmt: skip
    said = {"role": "user", "content": "How is the weather in Bonn in two days?"}
    question: dict[str, Any] = {"messages": [said], "temperature": 0}
    tool = {"type": "function", "function": {"name": "forecast", "parameters": schema}}
    wanted = {"type": "json_schema", "json_schema": {"name": "forecast", "schema": schema}}
    forced = {"tools": [tool], "tool_choice": "required", "parallel_tool_calls": False}
    called = made.ask(PATHS["chat"], {**question, **forced})["choices"][0]["message"]
    function = called["tool_calls"][0]["function"]
    text = made.ask(PATHS["chat"], {**question, "response_format": wanted})["choices"][0]["message"]["content"]
    require(function["name"] == "forecast", f"called is {called}")
    for given in (function["arguments"], text):
        read = json.loads(given)
        require(read.keys() == {"city", "days"} and read["city"] in ("Kyoto", "Bonn") and read["days"] in (1, 2), given)
    return f"a tool is called: {function['name']}({function['arguments']}); an answer fits its schema: {text}"


def traffic(made: Project, turn: int) -> None:
    """A little of everything: tenants, methods, drafts, reuse, and a wrong request."""
    words = {"max_tokens": 24, "ignore_eos": True}
    opening = f"Turn {turn}. " + "The harbour master asks about the following book. " * 4
    bodies: list[tuple[dict[str, Any], str]] = [
        ({**words, "prompt": DOCUMENT, "kv": {"selection": method, "budget": 256, "draft": draft}}, key)
        for method, draft, key in (("tidal_decode", False, "key-of-acme"), ("token_select", False, ""),
                                   ("recycled", True, "key-of-apex"))
    ]  # fmt: skip
    bodies += [
        ({**words, "prompt": text}, "key-of-acme") for text in (DOCUMENT, opening + DOCUMENT, f"{turn}{opening}{DOCUMENT}")
    ]
    bodies.append(({"prompt": "x", "temperature": -1}, ""))
    with ThreadPoolExecutor(4) as pool:
        for _ in pool.map(lambda one: _tried(made, *one), bodies):
            pass


def _tried(made: Project, body: dict[str, Any], key: str) -> None:
    try:
        made.ask(PATHS["text"], body, key)
    except urllib.error.HTTPError as error:
        require(body.get("temperature") == -1, f"{error.code}: {error.read().decode()[:300]}")


def asked(path: str) -> Any:
    """What Prometheus answers."""
    with urllib.request.urlopen(PROMETHEUS + path, timeout=10) as response:
        return json.load(response)["data"]


def panels(made: Project) -> str:
    """Every query of every panel returns data, of a server that has done a little of everything."""
    found, turn, end = dict(queries()), 0, time.monotonic() + 120
    while found and time.monotonic() < end:
        turn += 1
        traffic(made, turn)
        time.sleep(6)  # a scrape
        for expr in list(found):
            result = asked("/api/v1/query?" + urllib.parse.urlencode({"query": expr}))["result"]
            if any(sample["value"][1] != "NaN" for sample in result):
                del found[expr]
    missing = "; ".join(f"{where}: {expr}" for expr, where in found.items())
    require(not found, f"{len(found)} queries without data: {missing}")
    return f"all {len(queries())} queries of the dashboards return data"


def stream_ends_whole(made: Project) -> str:
    """A stream that is open when the server is stopped goes on to its end."""
    body = {"prompt": DOCUMENT, "max_tokens": 200, "ignore_eos": True, "stream": True}
    lines: list[str] = []
    begun = threading.Event()

    def read() -> None:
        with urllib.request.urlopen(made.request(PATHS["text"], body), timeout=120) as response:
            for line in response:
                if line.startswith(b"data: "):
                    lines.append(line.decode().strip())
                    begun.set()

    reader = threading.Thread(target=read)
    reader.start()
    require(begun.wait(60), "the stream did not begin")
    before, began = len(lines), time.monotonic()
    made.compose("stop", "server")
    took = time.monotonic() - began
    reader.join(60)
    require(lines and lines[-1] == "data: [DONE]", f"the stream ends with {lines[-1:]}")
    finish = json.loads(lines[-2][6:])["choices"][0]["finish_reason"]
    require(finish == "length" and before < len(lines), f"the stream ends with {finish}, {before} of {len(lines)} parts before")
    return f"stopped in {took:.1f} s with a stream open, of which {before} parts had come; all {len(lines)} came"


def alert_fires() -> str:
    """Prometheus says that the server is gone."""
    began = time.monotonic()
    while time.monotonic() < began + ALERT_SECONDS:
        if any(a["labels"]["alertname"] == "KvloomDown" and a["state"] == "firing" for a in asked("/api/v1/alerts")["alerts"]):
            return f"KvloomDown fires {time.monotonic() - began:.0f} s after the server has stopped"
        time.sleep(1)
    raise Wrong(f"KvloomDown does not fire within {ALERT_SECONDS:g} s")


def load_test(made: Project, image: str) -> str:
    """The load test writes its report into its volume."""
    run = ("--profile", "bench", "run", "--rm", "--no-TTY")
    said = made.compose(*run, "bench", "--num-requests", "4", "--rate", "2", timeout=300, KVLOOM_BENCH_IMAGE=image)
    files = made.compose(*run, "--entrypoint", "ls", "bench", "/reports", KVLOOM_BENCH_IMAGE=image).split()
    require("report.md" in files and "4 of 4 requests" in said, f"{files}: {said}")
    return f"the load test: {next(line for line in said.splitlines() if '4 of 4' in line)}; {len(files)} files in the volume"


def stops_idle(made: Project) -> str:
    """A server without requests stops soon, and says that it was no failure."""
    began = time.monotonic()
    made.compose("stop", "server")
    took = time.monotonic() - began
    state = json.loads(made.compose("ps", "--all", "--format", "json", "server").splitlines()[0])
    require(state["ExitCode"] == 0, f"the server ends with {state['ExitCode']}")
    require(took <= STOP_SECONDS, f"stopped after {took:.1f} s; at most {STOP_SECONDS:g}")
    return f"stopped in {took:.1f} s while idle, with exit code 0"


def wrong_key_file(made: Project) -> str:
    """An empty key file keeps the server from starting, with a sentence."""
    with tempfile.TemporaryDirectory() as folder:
        call("sh", FOLDER / "secrets.sh", folder)
        Path(folder, "api_key").write_text("\n")
        said = _refused(made, KVLOOM_SECRETS=folder)
    require("api_key_file /run/secrets/api_key holds no key" in said, f"with an empty key file: {said}")
    return f"an empty key file: {said}"


def _refused(made: Project, **env: str) -> str:
    """The last line of a server that does not start."""
    words = ("run", "--rm", "--no-deps", "--no-TTY", "server")
    try:
        made.compose(*words, timeout=60, **env)
    except Wrong as error:
        return str(error).splitlines()[-1]
    raise Wrong("the server starts")


def wrong_port(made: Project) -> str:
    """A port that is none is refused by compose, with a sentence."""
    try:
        made.compose("config", "--quiet", KVLOOM_PORT="99999")
    except Wrong as error:
        said = str(error).splitlines()[-1]
        require("99999" in said, f"with port 99999: {said}")
        return f"port 99999: {said}"
    raise Wrong("compose takes port 99999")


def docker(*words: str) -> str:
    """What docker prints. Raises Wrong if it fails."""
    return call(tool("docker"), *words, timeout=120)


@contextlib.contextmanager
def container(image: str, *flags: str) -> Iterator[str]:
    """A server on its own, healthy, locked down as in compose."""
    name = f"kvloom-check-{os.getpid()}"
    locked = ("--read-only", "--tmpfs", "/tmp", "--cap-drop", "ALL", "--security-opt", "no-new-privileges")
    docker("run", "--detach", "--name", name, *locked, *flags, image)
    try:
        end = time.monotonic() + 60
        while subprocess.run([tool("docker"), "exec", name, "python", "-m", "kvloom.server.probe"], capture_output=True,
                             check=False).returncode:  # fmt: skip
            require(time.monotonic() < end, f"not healthy: {logs(name)}")
            time.sleep(0.2)
        yield name
    finally:
        docker("rm", "--force", "--volumes", name)


def logs(name: str) -> str:
    """What a container wrote."""
    done = subprocess.run([tool("docker"), "logs", name], capture_output=True, text=True, check=False)
    return done.stdout + done.stderr


def inside(name: str) -> str:
    """What the server in a container answers to the first question, asked from within."""
    script = (
        "import json, urllib.request as u; body = {'model': 'smollm2', 'temperature': 0, 'messages': [{'role': 'user', "
        "'content': 'What is the capital of Japan?'}]}; r = u.Request('http://127.0.0.1:8000/v1/chat/completions', "
        "json.dumps(body).encode(), {'Content-Type': 'application/json'}); "
        "print(json.load(u.urlopen(r))['choices'][0]['message']['content'])"
    )
    return docker("exec", name, "python", "-c", script).strip()


def other_processor(image: str) -> str:
    """Kernels for a processor with AVX2 are in the image, and answer."""
    with container(image, "--network", "none", "--env", f"KVLOOM_NATIVE={VARIANT}") as name:
        text = inside(name)
        require(VARIANT in logs(name) and "Tokyo" in text, f"{text!r}; {logs(name)}")
        return f"with {VARIANT} forced and no network: {text}"


def second_start_offline(image: str, wheels: str | None) -> str:
    """What the first start left in the volume is all that the second needs."""
    volume = f"kvloom-check-{os.getpid()}"
    docker("volume", "create", volume)
    found = ("--volume", f"{wheels}:/wheels:ro", "--env", "PIP_NO_INDEX=1", "--env", "PIP_FIND_LINKS=/wheels") if wheels else ()
    times = []
    try:
        for flags in (found, ("--network", "none")):
            began = time.monotonic()
            with container(image, "--volume", f"{volume}:/var/cache/kvloom", *flags) as name:
                times.append(time.monotonic() - began)
                require("Tokyo" in inside(name), logs(name))
    finally:
        docker("volume", "rm", "--force", volume)
    return f"{image} is healthy after {times[0]:.1f} s at its first start, and after {times[1]:.1f} s without a network"
