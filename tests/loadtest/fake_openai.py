"""A server process that speaks enough of the API for a sweep: fake_openai.py PORT TOKENIZER [--selection S] [--budget N] ...

--selection refused ends with exit code 2, crash with 3, before it listens; deaf is healthy but answers every request with 500;
own generates tokens of its own where given ones are asked for. A smaller budget is faster and further from dense.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from tokenizers import Tokenizer

TOP = 4


def settings() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("port", type=int)
    parser.add_argument("tokenizer")
    parser.add_argument("--selection", default="dense")
    parser.add_argument("--budget", type=int, default=64)
    return parser.parse_args()


args = settings()
tokenizer = Tokenizer.from_file(f"{args.tokenizer}/tokenizer.json")


def logprobs(tokens: list[int]) -> dict[str, Any]:
    """Each token with probability 0.5, and three others; the smaller the budget, the more of it goes to the first of them."""
    shift = 4.0 / args.budget if args.selection != "dense" else 0.0
    texts = [tokenizer.decode([token]) for token in tokens]
    tops = []
    for text in texts:
        shares = (0.5 - shift, 0.2 + shift, 0.1, 0.05)
        names = (text, *[f"{text} {i}" for i in range(TOP - 1)])
        tops.append({name: math.log(share) for name, share in zip(names, shares)})
    values = [top[text] for top, text in zip(tops, texts)]
    return {"tokens": texts, "token_logprobs": values, "top_logprobs": tops, "text_offset": [0] * len(texts)}


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *words: object) -> None:
        """Say nothing."""

    def reply(self, status: int, body: dict[str, Any]) -> None:
        payload = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload)

    def do_GET(self) -> None:
        if self.path not in ("/health", "/v1/models"):
            return self.reply(404, {"error": {"message": "no such page"}})
        return self.reply(200, {"data": [{"id": "fake"}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if args.selection == "deaf":
            return self.reply(500, {"error": {"message": "I do not listen"}})
        if body.get("stream"):
            return self.stream(body)
        forced = [5, 6, 7] if args.selection == "own" else body["forced_tokens"]
        choice = {"text": tokenizer.decode(forced), "logprobs": logprobs(forced), "finish_reason": "length"}
        return self.reply(200, {"choices": [choice]})

    def stream(self, body: dict[str, Any]) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        count = body["max_tokens"]
        for i in range(count):
            time.sleep(0.002 if args.selection == "dense" else 0.001)
            self.event({"choices": [{"text": " word", "finish_reason": "length" if i == count - 1 else None}]})
        usage = {
            "prompt_tokens": len(body["prompt"]),
            "completion_tokens": count,
            "prompt_tokens_details": {"cached_tokens": 0},
        }
        self.event({"choices": [], "usage": usage})
        self.wfile.write(b"data: [DONE]\n\n")

    def event(self, content: dict[str, Any]) -> None:
        self.wfile.write(f"data: {json.dumps(content)}\n\n".encode())


if args.selection == "refused":
    print("kvloom: selection is 'refused'; allowed: dense", file=sys.stderr)
    sys.exit(2)
if args.selection == "crash":
    sys.exit(3)
ThreadingHTTPServer(("127.0.0.1", args.port), Handler).serve_forever()
