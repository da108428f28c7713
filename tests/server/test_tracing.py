"""Spans as a collector gets them: OTLP over HTTP, to a real socket."""

import http.server
import json
import subprocess
import sys
import threading

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from kvloom.engine.errors import ConfigError, OverloadedError
from kvloom.server import tracing
from kvloom.server.options import ServerOptions

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.fixture
def collector():
    """(endpoint, spans): what is sent there, as protobuf."""
    received = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            received.append((self.path, ExportTraceServiceRequest.FromString(body)))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}/v1/traces", received
    server.shutdown()
    server.server_close()


def value(any_value):
    kind = any_value.WhichOneof("value")
    return [value(item) for item in any_value.array_value.values] if kind == "array_value" else getattr(any_value, kind)


def spans_of(received):
    """(span, attributes, resource's attributes) of all that came."""
    for path, request in received:
        assert path == "/v1/traces"
        for resource in request.resource_spans:
            about = {pair.key: value(pair.value) for pair in resource.resource.attributes}
            for scope in resource.scope_spans:
                for span in scope.spans:
                    yield span, {pair.key: value(pair.value) for pair in span.attributes}, about


@pytest.fixture
def traced(serve_for, collector):
    """Runs `ask(client)` against a server that sends spans, and returns those, in the order of their end."""
    endpoint, received = collector

    def run(ask, engine=None):
        with serve_for(engine, otlp_traces_endpoint=endpoint) as running, running.client() as client:
            ask(client)
        return list(spans_of(received))  # the end of the server sends what waits

    return run


def test_a_span_per_generation_request(traced):
    def ask(client):
        body = {"messages": [{"role": "user", "content": "confidential"}], "max_tokens": 5, "temperature": 0.5, "n": 2}
        client.post("/v1/chat/completions", json=body, headers={"traceparent": PARENT, "X-Request-Id": "mine"})
        client.post("/v1/completions", json={"prompt": "confidential", "max_tokens": 3, "stream": True})
        client.get("/v1/models")

    (chat, attributes, about), (text, of_text, _) = traced(ask)
    assert (chat.name, text.name) == ("chat echo-model", "text_completion echo-model") and chat.kind == chat.SPAN_KIND_SERVER
    assert chat.trace_id.hex() == PARENT[3:35] and chat.parent_span_id.hex() == PARENT[36:52]
    assert text.trace_id != chat.trace_id and not text.parent_span_id
    assert 0 < chat.end_time_unix_nano - chat.start_time_unix_nano < 60e9
    assert about["service.name"] == "kvloom"
    assert attributes.pop("gen_ai.response.time_to_first_chunk") >= 0 and attributes.pop("gen_ai.latency.e2e") > 0
    prompt = attributes.pop("gen_ai.usage.input_tokens")
    assert (
        attributes.pop("gen_ai.usage.cache_read.input_tokens") + attributes.pop("gen_ai.usage.cache_creation.input_tokens")
        == prompt
    )
    assert attributes == {
        "gen_ai.operation.name": "chat", "gen_ai.provider.name": "kvloom", "gen_ai.request.model": "echo-model",
        "gen_ai.response.model": "echo-model", "gen_ai.response.id": "mine", "gen_ai.request.max_tokens": 5,
        "gen_ai.request.temperature": 0.5, "gen_ai.request.top_p": 1.0, "gen_ai.request.top_k": 0,
        "gen_ai.request.frequency_penalty": 0.0, "gen_ai.request.presence_penalty": 0.0, "gen_ai.request.choice.count": 2,
        "gen_ai.response.finish_reasons": ["length", "length"], "gen_ai.usage.output_tokens": 10,
        "gen_ai.latency.time_in_queue": 0.0,
    }  # fmt: skip
    assert of_text["gen_ai.usage.output_tokens"] == 3 and of_text["gen_ai.response.id"].startswith("cmpl-")


def test_what_fails_and_what_is_refused_says_so(traced, fake):
    engine = fake.FakeEngine()

    def ask(client):
        engine.fail_after = 2
        client.post("/v1/completions", json={"prompt": "hello", "max_tokens": 5})
        engine.refuse = OverloadedError("too much")
        client.post("/v1/completions", json={"prompt": "hello"}, headers={"traceparent": "nonsense"})

    failed, refused = traced(ask, engine)
    assert [span.status.code for span, *_ in (failed, refused)] == [2, 2]
    assert [attributes["error.type"] for _, attributes, _ in (failed, refused)] == ["GenerationError", "OverloadedError"]


def test_the_log_names_the_trace(traced, caplog):
    caplog.set_level("INFO", "kvloom.access")
    ((span, *_),) = traced(lambda client: client.post("/v1/completions", json={"prompt": "a", "max_tokens": 1}))
    assert caplog.records[-1].fields["trace_id"] == span.trace_id.hex()


def test_a_collector_that_is_not_there_harms_nobody(serving, monkeypatch):
    monkeypatch.setattr(tracing, "EXPORT_SECONDS", 0.2)
    with serving(otlp_traces_endpoint="http://127.0.0.1:9/v1/traces").client() as client:
        assert client.post("/v1/completions", json={"prompt": "a", "max_tokens": 1}).status_code == 200


@pytest.mark.parametrize("endpoint", ["nonsense", "ftp://a/b", "http://", "localhost:4317"])
def test_an_endpoint_that_is_none_is_refused(endpoint):
    with pytest.raises(ConfigError, match="otlp_traces_endpoint is"):
        ServerOptions(otlp_traces_endpoint=endpoint)


def test_missing_packages_are_named(monkeypatch):
    monkeypatch.setattr(tracing, "_PACKAGES", ("opentelemetry.sdk.trace", "opentelemetry.exporter.none.of_it"))
    with pytest.raises(ConfigError, match=r"opentelemetry.exporter.none.of_it is not installed; pip install 'kvloom\[otel\]'"):
        ServerOptions(otlp_traces_endpoint="http://127.0.0.1:4318/v1/traces")


def test_nothing_is_imported_without_the_setting():
    code = "import sys, kvloom.server.serve; print([name for name in sys.modules if name.startswith('opentelemetry.')])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60).stdout
    imported = json.loads(found.replace("'", '"'))
    assert not any(name.startswith(("opentelemetry.sdk", "opentelemetry.exporter")) for name in imported)
