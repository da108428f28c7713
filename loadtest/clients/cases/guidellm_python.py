"""guidellm."""

import json
import sys
import tempfile
from pathlib import Path

from measured import AT_ONCE, OUTPUT, PROMPTS, REQUESTS, SERVER, TOKENIZER, Counted, command, compared
from report import KEY, MODEL, require, run

GUIDELLM = Path(sys.executable).with_name("guidellm")


def measured(path, stream):
    """What it has measured: requests, and its figures."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = [json.dumps({"prompt": prompt, "output_tokens_count": OUTPUT}) for prompt in PROMPTS]
        (folder / "prompts.jsonl").write_text("\n".join(rows))
        target = f"target={SERVER},model={MODEL},api_key={KEY},request_format={path},stream={str(stream).lower()}"
        command(
            [str(GUIDELLM), "run", "--backend", f"kind=openai_http,{target}",
             "--profile", f"kind=concurrent,streams={AT_ONCE}", "--constraint", f"kind=max_requests,count={REQUESTS}",
             "--tokenizer", f"kind=huggingface_auto,model={TOKENIZER}", "--data", f"kind=json_file,path={folder}/prompts.jsonl",
             "--output", f"kind=json,path={folder}/result.json", "--disable-console"]
        )  # fmt: skip
        (told,) = json.loads((folder / "result.json").read_text())["benchmarks"]
    totals = told["metrics"]["request_totals"]
    require(totals["successful"] == totals["total"] == REQUESTS, f"{totals}")
    require(all(answer["output"] for answer in told["requests"]["successful"]), "an answer is empty")
    return told["metrics"]


def text():
    measured("/v1/chat/completions", stream=False)


def stream():
    told = measured("/v1/chat/completions", stream=True)
    first, whole = (told[name]["successful"]["mean"] for name in ("time_to_first_token_ms", "request_latency"))
    require(0 < first < whole * 1000, f"the first token after {first} ms, all after {whole} s")
    pieces = told["request_streaming_iterations_count"]["successful"]["max"]
    require(pieces > OUTPUT / 2, f"{pieces} pieces of {OUTPUT} tokens")


def counts():
    with compared() as found:
        told = measured("/v1/completions", stream=True)
        tokens = [round(told[f"{what}_token_count"]["successful"]["total_sum"]) for what in ("prompt", "output")]
        found.append(Counted(REQUESTS, *tokens))


run({"text": text, "stream": stream, "counts": counts})
