"""Which replica gets a request: one that has its adapter, unless those have more to do than others."""

from __future__ import annotations

from typing import Any

from ray.serve.request_router import MultiplexMixin, PendingRequest, RequestRouter, RunningReplica

from bedplate.hashing import sha256_of_few


class AdapterRouter(MultiplexMixin, RequestRouter):  # type: ignore[misc]
    """Ray's own router waits until all replicas that have an adapter are full before it sends a request elsewhere, so
    one adapter that all ask for keeps one replica busy while others are idle.

    This one sends a request elsewhere as soon as each of them has `spill` requests more than another replica, which
    then has the adapter too. An adapter that no replica has goes to the one that its name picks, whoever routes.
    """

    # How long a replica may take to say how many requests it has. Ray begins with a tenth of it, and whoever is late
    # is passed over: on a busy machine, another replica then loads the adapter, in place of one of its own.
    queue_len_response_deadline_s = RequestRouter.max_queue_len_response_deadline_s

    def initialize_state(self, spill: int = 4, **kwargs: Any) -> None:
        self._spill = spill

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Ranks of replicas, the preferred ones first. Ray takes the idlest of the first that has a free place."""
        if pending_request is None:
            return [candidate_replicas]
        pending_request.routing_context.should_backoff = True  # or Ray asks again and again without a pause
        name = pending_request.metadata.multiplexed_model_id
        if not name:
            return [candidate_replicas]
        order = sorted(candidate_replicas, key=lambda replica: _place(name, replica))
        having = [one for one in order if name in one.multiplexed_model_ids] or order[:1]
        others = [one for one in order if one not in having]
        if others:
            idlest = min(others, key=self._ongoing)
            if min(map(self._ongoing, having)) >= self._ongoing(idlest) + self._spill:
                return [[idlest], having, others]
        return [having, others]

    def _ongoing(self, replica: RunningReplica) -> int:
        """Requests, as far as this router knows."""
        return self.replica_queue_len_cache.get(replica.replica_id) or 0


def _place(name: str, replica: RunningReplica) -> str:
    """Another order of the replicas for each name, which stays the same for all others when one comes or goes."""
    return sha256_of_few(f"{name}\n{replica.replica_id.unique_id}".encode())
