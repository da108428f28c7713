"""`deploy.placement` as a request router of Ray Serve: it chooses for every call of a front's handle.

Ray calls this interface alpha: `tests/deploy` holds the names. It ships this module by value, so nothing here has a state.
"""

from __future__ import annotations

from typing import Any

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from kvloom.deploy.presence import placement_of, tell
from kvloom.deploy.prompt_keys import Prompt
from kvloom.deploy.wire import Order, Question, ReplicaLostError


class KVRouter(RequestRouter):
    """Sends an order where `Placement` chooses, and what names a replica to that one."""

    def initialize_state(self, secret: str = "", approximate: bool = False, **unknown: Any) -> None:
        """secret: of keys, as hex digits, the same for all fronts; approximate: whether prompts that do not say reuse KV
        approximately. Called by Ray Serve with the deployment's router arguments."""
        self._placement = placement_of(self.app_name, bytes.fromhex(secret))
        self._approximate = approximate
        self._prompts: dict[str, Prompt] = {}

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Called by Ray Serve at every change: of who is there, and of what they tell of themselves."""
        super().update_replicas(replicas)
        stats = {replica.replica_id.unique_id: replica.routing_stats or {} for replica in replicas}
        self._placement.update({name: told.get("capacity_tokens") for name, told in stats.items()})
        for name, told in stats.items():
            self._placement.report(name, float(told.get("waits", 0.0)), int(told.get("fronts", 1)))
        self._tell()

    def on_replica_actor_died(self, replica_id: ReplicaID) -> None:
        """Called by Ray Serve when a call found a replica dead."""
        super().on_replica_actor_died(replica_id)
        self._placement.update({name: None for name in self._placement.names if name != replica_id.unique_id})
        self._tell()

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Replicas to try, the best first, each rank on its own."""
        if pending_request is None or not pending_request.args:
            return [candidate_replicas]
        pending_request.routing_context.should_backoff = True  # without it Ray would ask again at once, and for ever
        asked = pending_request.args[0]
        by_name = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        named = getattr(asked, "replica", None)
        if named is not None and named not in by_name and not pending_request.future.done():
            pending_request.future.set_exception(ReplicaLostError(f"replica {named} is there no more"))
        if named is not None or not isinstance(asked, (Order, Question)):
            return [[by_name[named]] if named in by_name else candidate_replicas]
        choice = self._placement.choose(self._prompt(asked), by_name, getattr(asked, "avoid", ()))
        best = None if choice is None else by_name.get(choice.replica)
        if choice is None or best is None:
            return [candidate_replicas]
        if isinstance(asked, Order):  # others are chosen for before this one is on its way
            self._placement.placed(asked.key, self._prompt(asked), choice.replica, choice.reason)
        return [[best], [replica for replica in candidate_replicas if replica is not best]]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any) -> None:
        """Called by Ray Serve when a replica has taken a request: mostly the one that was chosen."""
        asked = pending_request.args[0] if pending_request.args else None
        if isinstance(asked, Order):
            self._placement.placed(asked.key, self._prompt(asked), replica_id.unique_id)
            self._prompts.pop(asked.key, None)

    def _prompt(self, asked: Order | Question) -> Prompt:
        if isinstance(asked, Question):
            given = asked.arguments
            tokens, tenant, salt = given.get("prompt", ()), given.get("tenant", ""), given.get("cache_salt", "")
            return self._placement.prompt(tokens, tenant, salt, segments=self._approximate)
        if (made := self._prompts.get(asked.key)) is None:
            approximate = asked.kv.reuse_or("approx" if self._approximate else "exact") == "approx"
            made = self._placement.prompt(asked.prompt, asked.tenant, asked.cache_salt, segments=approximate)
            self._prompts = {asked.key: made}  # asked for again at once, and then no more
        return made

    def _tell(self) -> None:
        tell(self.app_name, [replica_id.unique_id for replica_id in self.curr_replicas])
