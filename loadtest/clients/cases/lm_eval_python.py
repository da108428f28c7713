"""lm-eval: tasks by log-probabilities, perplexity of a text, tasks that generate."""

import json
import math
import os
import urllib.request

from report import KEY, MODEL, URL, require, run

os.environ["OPENAI_API_KEY"] = KEY
from lm_eval.api.instance import Instance
from lm_eval.models.openai_completions import LocalChatCompletion, LocalCompletionsAPI

TEXT = "Rivers begin as springs in the hills. They carry rain and snow to the sea, and with them boats, grain and timber. " * 4
TOLERANCE = 1e-3


def completions(**more):
    return LocalCompletionsAPI(base_url=f"{URL}/completions", model=MODEL, auth_token=KEY, tokenizer_backend="auto", **more)


def asked(kind, *given):
    return [Instance(kind, {}, one, i) for i, one in enumerate(given)]


def post(**body):
    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
    request = urllib.request.Request(f"{URL}/completions", json.dumps({"model": MODEL, **body}).encode(), headers)
    with urllib.request.urlopen(request, timeout=120) as reply:
        return json.load(reply)


def text():
    """Both ways to have a text generated."""
    how = {"until": ["\n\n"], "max_gen_toks": 16, "temperature": 0}
    (found,) = completions().generate_until(asked("generate_until", ("The capital of France is", how)))
    require("Paris" in found, f"it answers {found!r}")
    chats = LocalChatCompletion(base_url=f"{URL}/chat/completions", model=MODEL)
    rendered = chats.apply_chat_template([{"role": "user", "content": "What is the capital of France?"}])
    (found,) = chats.generate_until(asked("generate_until", (rendered, how)))
    require("Paris" in found, f"it answers {found!r}")


def counts():
    """By /tokenize, there and back."""
    model = completions()
    require(model.tokenizer_backend == "remote", f"auto chooses {model.tokenizer_backend}")
    tokens = model.tok_encode(TEXT)
    require(model.tokenizer.decode(tokens) == TEXT, "/detokenize gives another text")
    usage = post(prompt=TEXT, max_tokens=1)["usage"]
    require(usage["prompt_tokens"] == len(tokens), f"{len(tokens)} tokens, of which the server reads {usage['prompt_tokens']}")


def scores():
    """The likelier of two answers; and a perplexity that is that of the same tokens one by one, each in a decode step."""
    model = completions(batch_size=2)
    pairs = asked("loglikelihood", ("The capital of France is", " Paris"), ("The capital of France is", " a river of gold"))
    (right, greedy), (wrong, other) = model.loglikelihood(pairs)
    require(right > wrong and greedy and not other, f"{right} {greedy}, {wrong} {other}")
    (total,) = model.loglikelihood_rolling(asked("loglikelihood_rolling", (TEXT,)))
    tokens = model.tok_encode(TEXT)
    forced = post(prompt=[model.prefix_token_id], forced_tokens=tokens, max_tokens=len(tokens), logprobs=0, ignore_eos=True)
    found = forced["choices"][0]["logprobs"]["token_logprobs"]
    require(len(found) == len(tokens), f"{len(found)} of {len(tokens)} tokens are scored")
    theirs, ours = (math.exp(-value / len(tokens)) for value in (total, sum(found)))
    require(abs(theirs / ours - 1) < TOLERANCE, f"perplexity is {theirs:.5f}, by decode steps {ours:.5f}")


run({"text": text, "counts": counts, "scores": scores})
