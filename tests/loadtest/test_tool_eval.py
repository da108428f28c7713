"""Scoring of tool calls, and what is run of the clients."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from kvloom.engine.text import Tokenizer
from kvloom.loadtest.clients.__main__ import (
    SCRIPTS,
    InstallError,
    NotHereError,
    installed,
    merged,
    problems,
    row,
    write_tokenizer,
)
from kvloom.loadtest.clients.clients import CASES, CLIENTS
from kvloom.loadtest.quality.tool_eval import QUESTIONS, Call, is_right, main

RIGHT = {q.text: [{"name": q.name, "arguments": json.dumps(q.arguments)}] if q.name else [] for q in QUESTIONS}


class Handler(BaseHTTPRequestHandler):
    """Calls what is right, but for two questions; in streams in two pieces."""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        calls = RIGHT[body["messages"][0]["content"]]
        if "Paris" in body["messages"][0]["content"]:
            calls = []
        if "haiku" in body["messages"][0]["content"]:
            calls = [{"name": "get_weather", "arguments": "{}"}]
        whole = [{"id": str(i), "type": "function", "function": call} for i, call in enumerate(calls)]
        events = [json.dumps({"choices": [{"message": {"content": None, "tool_calls": whole}}]})]
        if body.get("stream"):
            starts = [{"index": i, "function": {**call, "arguments": ""}} for i, call in enumerate(calls)]
            pieces = [{"index": i, "function": {"arguments": call["arguments"]}} for i, call in enumerate(calls)]
            deltas = [{"tool_calls": starts}, {"tool_calls": pieces}, {"content": "x"}]
            events = [f"data: {json.dumps({'choices': [{'delta': delta}]})}\n\n" for delta in deltas] + ["data: [DONE]\n\n"]
        data = "".join(events).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *words):
        pass


def test_a_server_is_scored(tmp_path):
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_address[1]}"
        assert main(["--server", f"one={url}", "--model", "m", "--json", str(tmp_path / "rows.json")]) == 0
        server.shutdown()
    (measured,) = json.loads((tmp_path / "rows.json").read_text())
    assert [measured[key] for key in ("right", "right_streamed", "needed", "needless", "unneeded", "same")] == [
        19,
        19,
        20,
        1,
        5,
        25,
    ]


@pytest.mark.parametrize(
    ("calls", "right"),
    [
        ([Call("convert_currency", '{"amount": 100.0, "source": "usd", "target": "EUR"}')], True),
        ([Call("convert_currency", '{"amount": "100", "source": "USD", "target": "EUR"}')], False),
        ([Call("convert_currency", '{"amount": 100, "source": "USD"}')], False),
        ([Call("convert_currency", '{"amount": 100')], False),
        ([Call("get_weather", '{"amount": 100, "source": "USD", "target": "EUR"}')], False),
        ([], False),
    ],
)
def test_what_is_right(calls, right):
    question = next(q for q in QUESTIONS if "100 USD" in q.text)
    assert is_right(question, calls) is right
    assert not is_right(question, calls * 2)


def test_a_client_that_is_not_installed_is_named_by_a_variable(tmp_path, monkeypatch):
    client = next(client for client in CLIENTS if client.home)
    monkeypatch.delenv(client.home, raising=False)
    with pytest.raises(NotHereError, match=client.home):
        installed(client, tmp_path)
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    for version in ("0.1", client.version):
        python.write_text(f"#!/bin/sh\necho {version}\n")
        python.chmod(0o755)
        monkeypatch.setenv(client.home, str(tmp_path))
        if version == client.version:
            assert installed(client, tmp_path) == [str(python), str(SCRIPTS / client.script)]
        else:
            with pytest.raises(InstallError, match=r"0\.1; wanted"):
                installed(client, tmp_path)


def test_the_tokenizer_that_clients_count_with(tiny, tmp_path):
    write_tokenizer(str(tiny), tmp_path)
    mine, theirs = (Tokenizer.from_folder(folder) for folder in (tiny, tmp_path))
    text = "Two words, 3 numbers and a 🦊."
    assert theirs.encode(text) == mine.encode(text) and theirs.eos_ids[:1] == mine.eos_ids[:1]


def test_clients_are_pinned_and_have_scripts():
    for client in CLIENTS:
        assert (SCRIPTS / client.script).is_file() and client.version[0].isdigit()
        assert all("==" in name or "@" in name[1:] for name in client.packages)


def test_rows_of_clients():
    client = CLIENTS[0]
    assert row(client, {"text": "", "tools": "an error"})[2:5] == ["passed", "-", "failed"]
    assert len(row(client, {})) == 2 + len(CASES)
    assert "the script ended" in problems(["python3", "-c", "raise SystemExit('no')"], {})["text"]


def test_cases_that_a_script_did_not_reach_have_failed():
    script = 'print(\'{"cases": ["text", "tools"]}\'); print(\'{"case": "text", "problem": ""}\'); raise SystemExit("gone")'
    found = problems(["python3", "-c", script], {})
    assert found["text"] == "" and "gone" in found["tools"]


def test_published_rows_of_other_clients_stay(tmp_path):
    first, second = ([client.name, client.version, "passed"] for client in CLIENTS[:2])
    file = tmp_path / "figures.json"
    assert merged(file, [first])[:2] == [first, [*second[:2], "not run", *["-"] * (len(CASES) - 1)]]
    file.write_text(json.dumps({"rows": [first, [CLIENTS[1].name, "0.0", "failed"]]}))
    assert merged(file, [second])[:2] == [first, second] and len(merged(file, [second])) == len(CLIENTS)
