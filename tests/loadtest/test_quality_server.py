"""`kvloom eval server` against a server that says exactly what it is told."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from kvloom.engine.errors import ConfigError
from kvloom.loadtest.quality import server_eval
from kvloom.loadtest.quality.scoring import Completions, Scored, ServerError

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def words(text: str) -> list[str]:
    return [word + " " for word in text.split()]


def echo(chance: float) -> Handler:
    """Cuts texts into words, gives each the same probability, and answers with a planted password if there is one."""

    async def handle(request: web.Request) -> web.Response:
        body = await request.json()
        tokens = words(body["prompt"])
        if not body.get("echo"):
            sentence = body["prompt"].rsplit("\n", 1)[-1]
            at = body["prompt"].find(sentence + " ")
            answer = body["prompt"][at + len(sentence) :].split("\n")[0] if at >= 0 else " nothing"
            return web.json_response({"choices": [{"text": answer}]})
        rest = (1 - chance) / 2
        top = [None, *({token: math.log(chance), "<a>": math.log(rest)} for token in tokens[1:]), {}]
        found = {
            "tokens": [*tokens, "generated"],
            "token_logprobs": [None, *([math.log(chance)] * (len(tokens) - 1)), -1.0],
            "top_logprobs": top,
        }
        return web.json_response({"choices": [{"text": "", "logprobs": found}], "usage": {"prompt_tokens": len(tokens)}})

    return handle


def serving(handlers: list[Handler], work: Callable[[list[str]], None]) -> None:
    """Run blocking work in a thread beside one server per handler."""

    async def run() -> None:
        runners, urls = [], []
        for handler in handlers:
            app = web.Application(client_max_size=1 << 26)
            app.router.add_post("/v1/completions", handler)
            runner = web.AppRunner(app)
            await runner.setup()
            site = web.TCPSite(runner, "127.0.0.1", 0)
            await site.start()
            assert site._server is not None
            port = site._server.sockets[0].getsockname()[1]  # type: ignore[attr-defined]
            urls.append(f"http://127.0.0.1:{port}")
            runners.append(runner)
        try:
            await asyncio.to_thread(work, urls)
        finally:
            for runner in runners:
                await runner.cleanup()

    asyncio.run(run())


def arguments(url: str, tiny: Path, out: Path) -> list[str]:
    return ["--base-url", url, "--model", "m", "--tokenizer", str(tiny), "--contexts", "400", "--windows", "2",
            "--haystacks", "1", "--json", str(out / "rows.json"), "--markdown", str(out / "rows.md")]  # fmt: skip


def test_two_servers(tiny: Path, tmp_path: Path) -> None:
    def work(urls: list[str]) -> None:
        argv = [*arguments(urls[0], tiny, tmp_path), "--reference-url", urls[1]]
        assert server_eval.main(argv) == 0

    serving([echo(0.25), echo(0.5)], work)
    (row,) = json.loads((tmp_path / "rows.json").read_text())
    assert row["ppl"] == pytest.approx(4.0) and row["ppl_dense"] == pytest.approx(2.0)
    rest = [0.5, 0.25, 0.25], [0.25, 0.375, 0.375]
    assert row["kl_mean"] == pytest.approx(sum(p * math.log(p / q) for p, q in zip(*rest)))
    assert row["top1"] == 0.0  # the first server finds <a> likelier than the text
    assert row["needle"] == row["needle_dense"] == 1.0 and row["needle_trials"] == 8
    assert "| server |" in (tmp_path / "rows.md").read_text()


def test_the_generated_token_is_not_scored() -> None:
    async def score(url: str) -> Scored:
        async with Completions(url, "m") as server:
            return await server.score("one two three", 2)

    def work(urls: list[str]) -> None:
        found = asyncio.run(score(urls[0]))
        assert found.tokens == ("one ", "two ", "three ")
        assert found.logprobs == pytest.approx([math.log(0.5)] * 2) and len(found.top) == 2

    serving([echo(0.5)], work)


def failing(status: int, **headers: str) -> Handler:
    async def handle(request: web.Request) -> web.Response:
        return web.json_response({"error": {"message": "not today"}}, status=status, headers=headers)

    return handle


async def without_logprobs(request: web.Request) -> web.Response:
    return web.json_response({"choices": [{"text": "hello"}]})


@pytest.mark.parametrize(
    ("handler", "said"),
    [
        (failing(401), "401: .*not today"),
        (failing(429, **{"Retry-After": "7"}), "retry after 7 s"),
        (without_logprobs, "echo with logprobs"),
    ],
)
def test_failures_are_said_in_one_line(tiny: Path, tmp_path: Path, handler: Handler, said: str) -> None:
    def work(urls: list[str]) -> None:
        with pytest.raises(ServerError, match=said):
            server_eval.main(arguments(urls[0], tiny, tmp_path))

    serving([handler], work)
    assert not (tmp_path / "rows.json").exists()


def test_no_server(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(ServerError, match="cannot be used"):
        server_eval.main(arguments("http://127.0.0.1:1", tiny, tmp_path))


def test_what_was_measured_before_a_failure_is_kept(tiny: Path, tmp_path: Path) -> None:
    good = echo(0.5)

    async def scores_only(request: web.Request) -> web.StreamResponse:
        body: dict[str, Any] = await request.json()
        return await (good if body.get("echo") else failing(500))(request)

    def work(urls: list[str]) -> None:
        with pytest.raises(ServerError, match="500"):
            server_eval.main(arguments(urls[0], tiny, tmp_path))

    serving([scores_only], work)
    (row,) = json.loads((tmp_path / "rows.json").read_text())
    assert row["ppl"] == pytest.approx(2.0) and "needle" not in row


def test_bad_options() -> None:
    with pytest.raises(ConfigError, match="--kv"):
        server_eval.parse(["--base-url", "http://x", "--model", "m", "--kv", "{"])


def test_coarse_divergence_is_a_lower_bound() -> None:
    p, q = [0.5, 0.3, 0.15, 0.05], [0.4, 0.2, 0.25, 0.15]
    whole = sum(a * math.log(a / b) for a, b in zip(p, q))
    top = lambda values: {str(i): math.log(value) for i, value in enumerate(values[:2])}  # noqa: E731
    found = server_eval.coarse_divergence(top(p), top(q))
    assert 0 < found < whole
    assert server_eval.coarse_divergence(top(p), top(p)) == pytest.approx(0.0, abs=1e-12)
    assert server_eval.coarse_divergence({"a": math.log(0.9)}, {"b": math.log(0.9)}) == pytest.approx(0.0, abs=1e-12)
    assert server_eval.coarse_divergence({"a": -9999.0, "b": 0.0}, {"a": -0.7, "b": -0.7}) > 0.6


def test_servers_that_cut_texts_differently_are_not_compared() -> None:
    one, other = Scored(("a", "b"), (-1.0,), ({"b": -1.0},)), Scored(("ab",), (), ())
    with pytest.raises(ConfigError, match="same tokenizer"):
        server_eval.agreement([one], [other])
    with pytest.raises(ConfigError, match="top_logprobs"):
        server_eval.agreement([Scored(("a", "b"), (-1.0,), ({},))], [Scored(("a", "b"), (-1.0,), ({},))])
