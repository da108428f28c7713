"""Long and many texts: refused early, encoded in pieces off the loop, and never copied."""

import asyncio
import threading

import pytest

from kvloom.engine.errors import ContextLengthError, InvalidRequestError, OverloadedError
from kvloom.engine.thread.questions import WAITING_OF_TENANT
from kvloom.engine.thread.queue_limit import QueueLimit
from kvloom.server import fair_pool
from kvloom.server.fair_pool import FairPool
from kvloom.server.prompts import INLINE_CHARACTERS, MAX_DECODED, PIECE_CHARACTERS, PIECE_TEXTS, THREADS, PromptEncoder, _pieces

FREE = QueueLimit(1 << 30).enter


@pytest.fixture
def encoder(fake):
    made = PromptEncoder(fake.make_tokenizer(), 323, 4096, FREE)
    yield made
    made.close()


class Spy:
    """A tokenizer that notes where and on what it works."""

    def __init__(self, tokenizer):
        self._tokenizer = tokenizer
        self.batches = []
        self.threads = set()

    def __getattr__(self, name):
        return getattr(self._tokenizer, name)

    def encode_batch(self, texts, add_special_tokens=True):
        self.batches.append(list(texts))
        self.threads.add(threading.current_thread().name)
        return self._tokenizer.encode_batch(texts, add_special_tokens)

    def encode(self, text, add_special_tokens=True):
        return self.encode_batch([text], add_special_tokens)[0]


def test_the_bound_is_safe(fake):
    tokenizer = fake.make_tokenizer()
    for text in ("hello world" * 50, "the " * 100, "<|endoftext|>" * 60, "🦊" * 30, "<|im_start|>" * 9 + "\u0301\u0301"):
        assert 0 < tokenizer.least_tokens(text) <= len(tokenizer.encode(text))


def test_one_encoding_is_that_of_a_batch(fake):
    tokenizer = fake.make_tokenizer()
    texts = ["", "hello", "a 🦊 b", "<|im_end|> x"]
    assert tokenizer.encode_batch(texts) == [tokenizer.encode(text) for text in texts]
    assert tokenizer.encode_batch(texts) == [tokenizer.backend.encode(text).ids for text in texts]
    with pytest.raises(InvalidRequestError, match="surrogate"):
        tokenizer.encode("\ud800")


def test_texts_that_cannot_fit_are_refused_before_they_are_encoded(serving, fake):
    engine = fake.FakeEngine()
    spy = engine.tokenizer = Spy(engine.tokenizer)
    text = "hello " * 100_000
    with serving(engine).client() as client:
        for path, body in (
            ("/v1/completions", {"prompt": text}),
            ("/v1/completions", {"prompt": ["a", text]}),
            ("/v1/chat/completions", {"messages": [{"role": "user", "content": text}]}),
            ("/tokenize", {"prompt": text}),
            ("/v1/kv/explain", {"prompt": text}),
            ("/v1/kv/segments", {"text": text}),
        ):
            response = client.post(path, json=body)
            assert response.status_code == 400 and response.json()["error"]["code"] == "context_length_exceeded", path
            assert response.json()["error"]["message"].startswith(
                "This model's maximum context length is 4096 tokens. However, "
            )
    assert not spy.batches and not engine.calls


def test_long_texts_are_not_encoded_for_a_queue_that_is_full(serving, fake):
    engine = fake.FakeEngine()
    spy = engine.tokenizer = Spy(engine.tokenizer)
    engine.limit = QueueLimit(1000)
    text = "hello " * 500
    bodies = (
        ("/v1/completions", {"prompt": text, "max_tokens": 1}),
        ("/v1/completions", {"prompt": ["a"] * 100 + [text], "max_tokens": 1}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": text}], "max_tokens": 1}),
    )
    with serving(engine).client() as client:
        with engine.limit.enter("", 900):  # what waits
            for path, body in bodies:
                response = client.post(path, json=body)
                assert response.status_code == 429 and response.headers["retry-after"], path
            assert client.post("/v1/completions", json={"prompt": "hello", "max_tokens": 1}).status_code == 200, (
                "short ones are"
            )
        assert all(len(text) < INLINE_CHARACTERS for batch in spy.batches for text in batch)
        for path, body in bodies:
            assert client.post(path, json=body).status_code == 200, path
    assert (engine.limit.tokens, engine.limit.requests) == (0, 0), "the room goes back once the tokens are counted"


def test_many_short_texts_are_encoded_in_pieces_on_the_pool(serving, fake):
    engine = fake.FakeEngine()
    spy = engine.tokenizer = Spy(engine.tokenizer)
    texts = [f"hello {i}" for i in range(1000)]
    with serving(engine).client() as client:
        assert client.post("/v1/completions", json={"prompt": texts, "max_tokens": 1}).status_code == 200
    assert [len(batch) for batch in spy.batches] == [PIECE_TEXTS] * 3 + [1000 - 3 * PIECE_TEXTS]
    assert all(name.startswith("kvloom-text") for name in spy.threads)
    assert [call["prompt"] for call in engine.calls] == [spy._tokenizer.encode(text) for text in texts]


def test_long_texts_leave_the_loop_and_short_ones_do_not(fake):
    spy = Spy(fake.make_tokenizer())
    encoder = PromptEncoder(spy, 323, 1 << 20, FREE)
    asyncio.run(encoder.text("hi"))
    assert spy.threads == {threading.current_thread().name}
    spy.threads.clear()
    asyncio.run(encoder.text("hello " * INLINE_CHARACTERS))
    assert all(name.startswith("kvloom-text") for name in spy.threads) and spy.threads
    encoder.close()


def test_pieces():
    assert [len(piece) for piece in _pieces(["a" * 2 * PIECE_CHARACTERS] * 3 + ["b"] * 5)] == [1, 1, 1, 5]
    texts = [str(i) for i in range(1000)]
    assert [text for piece in _pieces(texts) for text in piece] == texts


def test_what_waits_for_the_pool_is_bounded(encoder, monkeypatch):
    monkeypatch.setattr(fair_pool, "MAX_WAITING", 2)

    async def scenario():
        texts = ["hello " * 1000] * 5
        results = await asyncio.gather(*(encoder.of("a").text(text) for text in texts), return_exceptions=True)
        assert sum(isinstance(result, OverloadedError) for result in results) == 5 - THREADS - 2
        assert await encoder.of("a").text(texts[0])

    asyncio.run(scenario())


def test_tenants_take_turns_on_the_pool():
    """One floods; another's text waits for one piece at most, and who gives up keeps nobody from a thread."""
    begun, go_on = [], threading.Event()
    pool = FairPool(1, lambda: None)

    def work(name):
        begun.append(name)
        assert go_on.wait(30)

    async def scenario():
        flood = [asyncio.ensure_future(pool.run("flood", lambda i=i: work(f"flood {i}"))) for i in range(6)]
        await asyncio.sleep(0)
        quiet = [asyncio.ensure_future(pool.run("quiet", lambda i=i: work(f"quiet {i}"))) for i in range(2)]
        await asyncio.sleep(0)
        flood[1].cancel()
        quiet[1].cancel()
        await asyncio.sleep(0)
        go_on.set()
        results = await asyncio.gather(*flood, *quiet, return_exceptions=True)
        assert sum(isinstance(result, asyncio.CancelledError) for result in results) == 2
        flood[0] = asyncio.ensure_future(pool.run("flood", lambda: work("again")))
        await flood[0]

    asyncio.run(scenario())
    assert begun[:2] == ["flood 0", "quiet 0"]
    assert sorted(begun[:-1]) == ["flood 0", "flood 2", "flood 3", "flood 4", "flood 5", "quiet 0"] and begun[-1] == "again"
    assert not pool._lanes
    pool.close()


def test_questions_are_refused_before_they_are_encoded(serving, fake, until):
    """Four of a tenant's at once; what is over is told so without any work, and others are not concerned."""
    engine = fake.FakeEngine()
    spy = engine.tokenizer = Spy(engine.tokenizer)
    go_on, waiting, explain = threading.Event(), [], engine.explain

    async def slow(*args, **kwargs):
        waiting.append(args)
        await asyncio.to_thread(go_on.wait, 30)
        return await explain(*args, **kwargs)

    engine.explain = slow
    running = serving(engine, tenant_keys={"k": "a", "l": "b"})
    statuses = []

    def ask(key):
        with running.client(Authorization=f"Bearer {key}") as client:
            statuses.append(client.post("/v1/kv/explain", json={"prompt": "hello"}).status_code)

    threads = [threading.Thread(target=ask, args=("k",)) for _ in range(WAITING_OF_TENANT)]
    for thread in threads:
        thread.start()
    until(lambda: len(waiting) == WAITING_OF_TENANT)
    encoded = len(spy.batches)
    ask("k")
    assert statuses == [429] and len(spy.batches) == encoded
    other = threading.Thread(target=ask, args=("l",))
    other.start()
    until(lambda: len(waiting) == WAITING_OF_TENANT + 1)
    go_on.set()
    for thread in (*threads, other):
        thread.join(30)
    ask("k")
    assert statuses == [429] + [200] * (WAITING_OF_TENANT + 2)


def test_ids_that_cannot_fit_are_refused_before_anything_is_made_of_them(serving, fake):
    engine = fake.FakeEngine()
    with serving(engine).client() as client:
        response = client.post("/v1/completions", json={"n": 64, "prompt": [7] * 100_000})
    assert response.status_code == 400 and response.json()["error"]["code"] == "context_length_exceeded"
    assert not engine.calls


def test_completions_share_one_prompt(serving, fake):
    engine = fake.FakeEngine()
    seen, generate = [], engine.generate

    def noting(prompt, *args, **kwargs):
        seen.append(prompt)
        return generate(prompt, *args, **kwargs)

    engine.generate = noting
    with serving(engine).client() as client:
        client.post("/v1/completions", json={"prompt": [[7, 8], [9]], "n": 8, "max_tokens": 1})
    assert len(seen) == 16 and len({id(prompt) for prompt in seen}) == 2 and all(isinstance(p, tuple) for p in seen)


def test_decoding_is_bounded(served, encoder):
    with served.client() as client:
        assert client.post("/detokenize", json={"tokens": [5] * (MAX_DECODED + 1)}).status_code == 400
        assert client.post("/detokenize", json={"tokens": [5] * 5000}).json() == {
            "prompt": served.engine.tokenizer.decode([5] * 5000)
        }
    with pytest.raises(ContextLengthError):
        encoder.check_length(4096)
    encoder.check_length(4095)
