"""vllm bench serve."""

import json
import sys
import tempfile
from pathlib import Path

from measured import AT_ONCE, OUTPUT, REQUESTS, SERVER, TOKENIZER, Counted, command, compared
from report import MODEL, require, run

VLLM = Path(sys.executable).with_name("vllm")
INPUT = 40


def measured(*more):
    """What it has measured of streams, by the names of its report."""
    with tempfile.TemporaryDirectory() as folder:
        command(
            [str(VLLM), "bench", "serve", "--base-url", SERVER, "--model", MODEL, "--tokenizer", TOKENIZER, "--ignore-eos",
             "--dataset-name", "random", "--random-input-len", str(INPUT), "--random-output-len", str(OUTPUT), "--num-prompts",
             str(REQUESTS), "--max-concurrency", str(AT_ONCE), "--disable-tqdm", "--save-result", "--save-detailed",
             "--result-dir", folder, "--result-filename", "result.json", *more]
        )  # fmt: skip
        told = json.loads((Path(folder) / "result.json").read_text())
    require((told["completed"], told["failed"]) == (REQUESTS, 0), f"{told['completed']} answers: {told['errors']}")
    require(any(told["itls"]), "every answer came in one piece")  # one may, where the client itself had to wait for a processor
    return told


def stream():
    told = measured("--backend", "openai-chat", "--endpoint", "/v1/chat/completions")
    require(all(told["generated_texts"]), "an answer is empty")


def counts():
    """By its own tokenizer for prompts, which chats would put into their template."""
    with compared() as found:
        told = measured("--backend", "openai", "--endpoint", "/v1/completions")
        found.append(Counted(told["completed"], told["total_input_tokens"], told["total_output_tokens"]))
    require(told["total_input_tokens"] == REQUESTS * INPUT, f"{told['total_input_tokens']} tokens of prompts")


run({"stream": stream, "counts": counts})
