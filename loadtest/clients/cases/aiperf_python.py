"""aiperf."""

import json
import sys
import tempfile
from pathlib import Path

from measured import AT_ONCE, OUTPUT, PROMPTS, REQUESTS, SERVER, TOKENIZER, Counted, command, compared
from report import KEY, MODEL, require, run

AIPERF = Path(sys.executable).with_name("aiperf")


def measured(kind, *more):
    """What it has measured, by the names of its report, and a record of every request."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "prompts.jsonl").write_text("\n".join(json.dumps({"text": prompt}) for prompt in PROMPTS))
        command(
            [str(AIPERF), "profile", "--model", MODEL, "--url", SERVER, "--api-key", KEY, "--endpoint-type", kind,
             "--tokenizer", TOKENIZER, "--input-file", str(folder / "prompts.jsonl"), "--custom-dataset-type", "single-turn",
             "--concurrency", str(AT_ONCE), "--request-count", str(REQUESTS), "--output-artifact-dir", str(folder / "out"),
             "--extra-inputs", "ignore_eos:true", f"max_tokens:{OUTPUT}", "temperature:0", "--ui", "none", *more],
            HF_HUB_OFFLINE="",  # else it looks for folders in the hub's cache
        )  # fmt: skip
        told = json.loads((folder / "out" / "profile_export_aiperf.json").read_text())
        records = [json.loads(line) for line in (folder / "out" / "profile_export.jsonl").read_text().splitlines()]
    require(told["request_count"]["avg"] == len(records) == REQUESTS, f"{told['request_count']} answers")
    require(not any(record.get("error") for record in records), "an answer is an error")
    return told, [record["metrics"] for record in records]


def tokens(records):
    sums = [sum(record[f"{what}_sequence_length"]["value"] for record in records) for what in ("input", "output")]
    return Counted(len(records), *map(round, sums))


def text():
    """Its tokens are those that answers report."""
    with compared() as found:
        found.append(tokens(measured("chat", "--use-server-token-count")[1]))


def stream():
    told, records = measured("chat", "--streaming")
    apart = [one["time_to_first_token"]["value"] < one["request_latency"]["value"] for one in records]
    require(any(apart), "every answer came in one piece")  # one may, where the client itself had to wait for a processor
    require(told["inter_token_latency"]["avg"] > 0, "no time between tokens")


def counts():
    """By its own tokenizer, prompts and answers."""
    with compared() as found:
        found.append(tokens(measured("completions", "--streaming")[1]))


run({"text": text, "stream": stream, "counts": counts})
