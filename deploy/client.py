"""`EngineClient` over replicas: what the HTTP side has where `--replicas` is given.

    generate   the router's replica; taken up by another where one is lost (`deploy.resume`)
    uploads    every replica, and those that come later: kept here, bounded
    questions  of a prompt: the replica where `generate` would go; of tenants: all, answers folded as the protocol says
    figures    as `deploy.fleet` heard them last

Everything runs on one event loop.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
import logging
import secrets
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.serve.exceptions import BackPressureError, RequestCancelledError
from ray.serve.handle import DeploymentHandle

from kvloom.deploy.fleet import Fleet, Owner
from kvloom.deploy.placement import DEFAULT_CAPACITY
from kvloom.deploy.presence import placement_of
from kvloom.deploy.resume import Received
from kvloom.deploy.uploads import Upload, Uploads
from kvloom.deploy.wire import Order, Question, ReplicaLostError, packed
from kvloom.engine.client import EngineStats, Health, ModelInfo, TenantStats, fold_of
from kvloom.engine.errors import EngineDeadError, InternalError, KVLoomError, OverloadedError
from kvloom.engine.requests.request import KVOptions, RequestOutput, Usage
from kvloom.engine.requests.sampling import SamplingParams
from kvloom.engine.requests.tenants import Tenants
from kvloom.engine.thread.backlog import Backlog
from kvloom.engine.thread.queue_limit import QUEUED_CAPACITIES, Place, QueueLimit

log = logging.getLogger("kvloom.server")

MOST_TRIES = 8
"""How often a request is sent: one that loses so many replicas is given up, it may be what ends them."""
END_SECONDS = 10.0
"""How long a last output may take after the call that made it has ended."""
ASK_SECONDS = 30.0
"""How long a replica may take to answer a question."""
TENANTS_SECONDS = 0.8
"""How long replicas may take to tell what tenants hold: a scrape waits for it."""
CATCH_UP_TRIES, CATCH_UP_SECONDS = 20, 0.5
"""How often a text is brought to a replica that is too busy for it, and the pause before the next try."""


class ReplicaClient:
    """Engines behind a handle of Ray Serve. See `client.EngineClient`."""

    def __init__(self, handle: DeploymentHandle, application: str, model: ModelInfo, tokenizer: Any, tenants: Tenants,
                 max_queued_tokens: int | None = None, wanted: int = 1,
                 broken: Callable[[], str] | None = None) -> None:  # fmt: skip
        """handle: of the deployment of `replica.Replica` in that application. model: as a replica describes it.
        max_queued_tokens: prompt tokens that may wait for each replica. wanted: how many there should be, at least.
        broken: where all of it is ours and on this machine, says what has ended that replicas need, or nothing."""
        self.model, self.tokenizer = replace(model, replica="0"), tokenizer
        self._handle, self._broken = handle, broken
        self._placement = placement_of(application)
        self._front = secrets.token_hex(8)
        owner = Owner(took=self._took, joined=self._catch_up, hang=self._hang, holds=self._holds)
        self._fleet = Fleet(handle, application, self._front, owner, ours=broken is not None)
        self._keys = itertools.count()
        self._streams: dict[str, Backlog] = {}
        self._uploads = Uploads()
        self._wanted, self._resumed, self._prompt_tokens, self._generated = wanted, 0, 0, 0
        self._per_replica = max_queued_tokens
        self._queue = QueueLimit(
            max_queued_tokens or QUEUED_CAPACITIES * DEFAULT_CAPACITY, lambda name: tenants.get(name).weight
        )
        self._loop: asyncio.AbstractEventLoop | None = None
        self._closing = False

    # Requests ------------------------------------------------------------------------------------------------------------

    async def generate(
        self,
        prompt: Sequence[int],
        sampling: SamplingParams,
        *,
        request_id: str,
        kv: KVOptions = KVOptions(),
        priority: int = 0,
        tenant: str = "",
        cache_salt: str = "",
    ) -> AsyncIterator[RequestOutput]:
        """See `EngineClient.generate`."""
        self._start()
        if sampling.seed is None:
            sampling = replace(sampling, seed=secrets.randbits(63))
        order = Order(front=self._front, key="", request_id=request_id, prompt=packed(prompt), sampling=sampling, kv=kv,
                      priority=priority, tenant=tenant, cache_salt=cache_salt)  # fmt: skip
        if kv.everywhere:
            yield await self._upload(order)
            return
        place, received, lost = self._queue.enter(tenant, len(prompt)), Received(sampling), list[str]()
        try:
            while True:
                asked = received.next_try()
                try:
                    async with aclosing(self._try(replace(order, sampling=asked, avoid=tuple(lost)), lost)) as outputs:
                        async for output in outputs:
                            place.leave()
                            new = received.new(output)
                            if new is not None:
                                if new.tokens and len(received.tokens) == len(new.tokens):
                                    self._prompt_tokens += len(prompt)
                                self._generated += len(new.tokens)
                                yield new
                    return
                except ReplicaLostError as error:
                    if self._closing or received.tries >= MOST_TRIES:
                        raise EngineDeadError(f"{received.tries} replicas were lost while they answered") from error
                    self._resumed += 1
                    log.warning("%s goes on elsewhere after %d tokens: %s", request_id, len(received.tokens), error)
        finally:
            place.leave()

    async def _try(self, order: Order, lost: list[str]) -> AsyncGenerator[RequestOutput, None]:
        """One try. Raises ReplicaLostError if its replica is lost, whose name `lost` then ends with."""
        await self._fleet.some()
        order = replace(order, key=f"{order.request_id}#{next(self._keys)}")
        self._placement.announce(order.key)
        response = self._handle.run.remote(order)
        stream = self._streams[order.key] = Backlog(response.cancel)
        watching = self._fleet.keep(self._watch(response, stream))
        done = False
        try:
            while not done:
                output = await stream.get()
                if isinstance(output, KVLoomError):
                    done = True
                    dead = isinstance(output, EngineDeadError) and not self._closing
                    raise ReplicaLostError(str(output)) if dead else output
                if output.finish_reason == "abort":  # the replica ends before its requests have
                    done = True
                    raise ReplicaLostError("its replica was shut down")
                if output.usage.completion_tokens or output.finish_reason is not None:
                    self._placement.began(order.key, _found(output.usage))
                done = output.finish_reason is not None
                yield output
        except ReplicaLostError:
            if (name := self._placement.where(order.key)) is not None:
                lost.append(name)
            raise
        finally:
            del self._streams[order.key]
            self._placement.ended(order.key)
            if done:
                watching.cancel()
            else:
                response.cancel()

    async def _watch(self, response: Any, stream: Backlog) -> None:
        """Tell a stream why it gets nothing more, where that is no output."""
        try:
            error: KVLoomError | None = await _asked(response)
            if error is None:
                await asyncio.sleep(END_SECONDS)
                error = ReplicaLostError("its last output has not come")
            stream.put_nowait(error)
        except KVLoomError as error:
            stream.put_nowait(error)
        except RequestCancelledError:
            stream.put_nowait(ReplicaLostError("the call was ended"))
        except Exception:
            log.exception("a call to a replica has failed")
            stream.put_nowait(InternalError("internal error; the server's log says more"))

    def reserve(self, tenant: str, tokens: int) -> Place:
        """See `EngineClient.reserve`."""
        return self._queue.enter(tenant, tokens)

    async def abort(self, request_id: str) -> None:
        """See `EngineClient.abort`."""
        for key, stream in list(self._streams.items()):
            if key.rpartition("#")[0] == request_id:
                stream.put_nowait(InternalError("the request was aborted"))

    # Uploads -------------------------------------------------------------------------------------------------------------

    async def _upload(self, order: Order) -> RequestOutput:
        """Have every replica compile a text. Returns what the first of them says."""
        await self._fleet.some()
        upload = Upload(order.prompt, order.kv, order.tenant, order.cache_salt)
        self._uploads.add(upload)  # at once: one that joins while it is compiled is to have it, too
        answers = await asyncio.gather(*(self._compile(order, name) for name in self._fleet.present), return_exceptions=True)
        outputs = [answer for answer in answers if isinstance(answer, RequestOutput)]
        try:
            _raise_first(answers)
        except BaseException:
            self._uploads.discard(upload)
            raise
        if not outputs:
            raise EngineDeadError("every replica was lost while it compiled; try again")
        return outputs[0]

    async def _compile(self, order: Order, name: str) -> RequestOutput:
        last = None
        async with aclosing(self._try(replace(order, replica=name), [])) as outputs:
            async for output in outputs:
                last = output
        assert last is not None
        return last

    async def _catch_up(self, name: str) -> None:
        """Compile what was uploaded before this replica came."""
        for upload in self._uploads:
            order = Order(
                front=self._front, key="", request_id="upload", prompt=upload.prompt, kv=upload.kv, priority=0,
                sampling=SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True, seed=0), tenant=upload.tenant,
                cache_salt=upload.cache_salt,
            )  # fmt: skip
            for tried in range(CATCH_UP_TRIES):
                if upload not in self._uploads or name not in self._fleet.present:
                    break  # purged in the meantime, or gone
                try:
                    await self._compile(order, name)
                    if upload not in self._uploads:
                        await self._ask_one(Question("purge", {"tenant": upload.tenant}, name))
                    break
                except OverloadedError:
                    await asyncio.sleep(CATCH_UP_SECONDS * (tried + 1))
                except KVLoomError as error:
                    log.warning("replica %s has not got an upload: %s", name, error)
                    break

    # Questions -----------------------------------------------------------------------------------------------------------

    async def explain(self, prompt: Sequence[int], *, tenant: str = "", cache_salt: str = "") -> Mapping[str, Any]:
        """See `EngineClient.explain`. Asks where the prompt would go, and names it."""
        name, told = await self._ask_for("explain", prompt, tenant, cache_salt)
        return {**told, "replica": name}

    async def peek(self, prompt: Sequence[int], *, tenant: str = "", cache_salt: str = "") -> int:
        """See `EngineClient.peek`. Asks where the prompt would go."""
        _, found = await self._ask_for("peek", prompt, tenant, cache_salt)
        return int(found)

    async def purge(self, tenant: str) -> int:
        """See `EngineClient.purge`. Of a replica that is lost all is gone."""
        self._uploads.purge(tenant)
        return int(await self._ask_all("purge", {"tenant": tenant}))

    async def reset(self) -> Mapping[str, int]:
        """See `EngineClient.reset`. Uploads are forgotten with the rest, and so is where prompts were."""
        self._uploads.clear()
        told: Mapping[str, int] = await self._ask_all("reset", {})
        self._placement.forget()
        return told

    async def tenants(self, names: Sequence[str] | None = None) -> Mapping[str, TenantStats]:
        """See `EngineClient.tenants`."""
        self._start()
        await self._fleet.some()
        questions = {name: asyncio.ensure_future(self._ask_one(Question("tenants", {"names": names}, name)))
                     for name in self._fleet.present}  # fmt: skip
        await asyncio.wait(questions.values(), timeout=TENANTS_SECONDS)
        for name, question in questions.items():
            if not question.done():
                question.cancel()  # it is told of as it was before
            elif question.exception() is None:
                self._fleet.note_tenants(name, question.result()[1], whole=names is None)
        found = self._fleet.tenants()
        return found if names is None else {name: found.get(name, TenantStats()) for name in names}

    async def _ask_for(self, method: str, prompt: Sequence[int], tenant: str, cache_salt: str) -> tuple[str, Any]:
        self._start()
        await self._fleet.some()
        return await self._ask_one(Question(method, {"prompt": tuple(prompt), "tenant": tenant, "cache_salt": cache_salt}))

    async def _ask_all(self, method: str, arguments: Mapping[str, Any]) -> Any:
        self._start()
        await self._fleet.some()
        questions = [self._ask_one(Question(method, arguments, name)) for name in self._fleet.present]
        answers = await asyncio.gather(*questions, return_exceptions=True)
        _raise_first(answers)
        told = [one[1] for one in answers if not isinstance(one, BaseException)]
        fold = fold_of(method)
        if not told or fold is None:
            raise EngineDeadError("no replica answered; try again")
        return functools.reduce(fold, told)

    async def _ask_one(self, question: Question) -> tuple[str, Any]:
        response = self._handle.ask.remote(question)
        try:
            async with asyncio.timeout(ASK_SECONDS):
                name, told = await _asked(response)
        except TimeoutError:
            response.cancel()
            raise ReplicaLostError(f"a replica did not answer in {ASK_SECONDS:g} s") from None
        if isinstance(told, KVLoomError):
            raise told
        return name, told

    # Figures -------------------------------------------------------------------------------------------------------------

    async def stats(self) -> EngineStats:
        """See `EngineClient.stats`. Tokens are counted here, as they came: one that two replicas computed counts once."""
        self._start()
        return replace(
            await self._fleet.stats(), prompt_tokens=self._prompt_tokens, generation_tokens=self._generated,
            replicas_wanted=self._wanted, replicas_lost=self._fleet.lost, requests_resumed=self._resumed,
            routed=dict(self._placement.routed),
        )  # fmt: skip

    async def health(self) -> Health:
        """See `EngineClient.health`. Well while one replica is; Ray brings back the others."""
        self._start()
        if self._broken is not None and (reason := self._broken()):
            return Health(ok=False, reason=reason)
        return self._fleet.health

    # What the fleet hears ------------------------------------------------------------------------------------------------

    def _start(self) -> None:
        """Begin to listen to replicas, on the event loop that asks first."""
        if self._loop is None:
            self._loop = asyncio.get_running_loop()
            self._fleet.start()

    def _took(self, key: str, output: RequestOutput) -> None:
        if (stream := self._streams.get(key)) is not None:
            stream.put_nowait(output)

    def _hang(self, silent: set[str]) -> None:
        """What runs on these goes on elsewhere, and nothing goes there until they are heard of."""
        self._placement.shun(silent)
        for key, stream in list(self._streams.items()) if silent else ():
            if self._placement.where(key) in silent:
                stream.put_nowait(ReplicaLostError("nothing is heard of its replica"))

    def _holds(self, tokens: int, replicas: int) -> None:
        """As much may wait, in all."""
        most = self._per_replica
        if replicas and (tokens or most is not None):  # until it is known, and while there is none, what was
            self._queue.most_tokens = QUEUED_CAPACITIES * tokens if most is None else most * replicas

    def close(self) -> None:
        """See `EngineClient.close`. Ends the requests of this front; replicas are Ray's."""
        if self._closing:
            return
        self._closing = True
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._end)

    def _end(self) -> None:
        for stream in self._streams.values():
            stream.put_nowait(EngineDeadError("the server is shutting down"))
        self._fleet.close()


def _found(usage: Usage) -> int:
    """Prompt tokens that a replica had, wherever."""
    return usage.cached_tokens + usage.reused_tokens + usage.recomputed_tokens


def _raise_first(answers: Sequence[Any]) -> None:
    """Raise the first error among answers, but for replicas that are lost."""
    for answer in answers:
        if isinstance(answer, BaseException) and not isinstance(answer, ReplicaLostError):
            raise answer


async def _asked(response: Any) -> Any:
    """What a call returns. Raises ReplicaLostError if there is no replica any more, InternalError if it failed."""
    try:
        return await response
    except RayTaskError as error:
        log.error("a replica failed: %s", error)
        raise InternalError("internal error; the server's log says more") from None
    except BackPressureError:
        raise OverloadedError("every replica has as many requests as it takes; try again later") from None
    except RayActorError as error:
        raise ReplicaLostError(f"replica lost: {error.__class__.__name__}") from None
    except RayError as error:
        raise ReplicaLostError(f"no answer: {error.__class__.__name__}") from None
