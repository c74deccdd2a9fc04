"""What an operator sets."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from bedplate.serve.keys import Keys
from bedplate.serve.settings import Settings

Count = Annotated[int, Field(ge=1)]
Seconds = Annotated[float, Field(gt=0)]
_OF_RAY = {"host", "port", "keys", "drain", "allow_adapters_from", "max_adapters", "watch"}


class RayOptions(BaseModel):
    """The arguments of the application.

    bundle: a folder that each node has, or a URL that fsspec knows. Each node fetches it once.
    adapters: further ones: a folder that each node has, or a URL, with a folder of PEFT for each adapter; or another
        bundle of the same foundation, whose adapters are packed. The same bundle: what is added to it while it is
        served is served too.
    storage: options of fsspec for both.  cache: the folder in which nodes keep what they fetch.
    name: of the base. None: as the bundle's folder.

    replicas, max_replicas: there are as many as the requests need, between these numbers. None: always `replicas`.
    target_requests: how many requests a replica should have; more make further replicas start.  max_requests: how many
        it has at most. Others wait.  max_waiting: for each ingress; others are refused. -1: no limit.
    spill: a request goes to a replica without its adapter if all that have it have so many requests more.
    adapters_per_replica: how many a replica keeps.
    ingresses: how many processes take requests and pass them on.
    drain_seconds: how long a replica that is to stop may work on what it has begun.

    refresh_seconds: how often a replica looks at the adapters: a changed one is used after this time at the latest.
    stale_seconds: if the adapters cannot be looked at for so long, requests for them are refused.

    threads: that compute in a replica. Ray counts as many CPUs for it.
    kv, max_context, memory_bytes, cache_bytes: see `bedplate.Engine`.
    api_key_file: who may use it: a file that each node has, as for `bedplate serve`.
    settings: fields of `bedplate.serve.settings.Settings`. Each replica counts for itself what they limit, and each
        ingress the bytes of the bodies that it holds.
    """

    model_config = ConfigDict(extra="forbid")

    bundle: str
    adapters: str | None = None
    storage: dict[str, Any] = {}
    cache: str | None = None
    name: str | None = None

    replicas: Count = 1
    max_replicas: Count | None = None
    target_requests: Count = 8
    max_requests: Count = 32
    max_waiting: Annotated[int, Field(ge=-1)] = 256
    spill: Count = 4
    adapters_per_replica: Count = 16
    ingresses: Count = 1
    drain_seconds: Seconds = 120

    refresh_seconds: Seconds = 5
    stale_seconds: Seconds = 300

    threads: Count = 1
    kv: Literal["float16", "float32"] = "float16"
    max_context: Count | None = None
    memory_bytes: Annotated[int, Field(ge=0)] | None = None
    cache_bytes: Annotated[int, Field(ge=0)] | None = None
    api_key_file: str | None = None
    settings: dict[str, Any] = {}

    @model_validator(mode="after")
    def _check(self) -> Self:
        if wrong := sorted(self.settings.keys() & _OF_RAY):
            raise ValueError(f"settings has {', '.join(wrong)}, which a server on Ray does not use")
        try:
            Settings(**self.settings)
        except TypeError as error:
            raise ValueError(f"settings: {error}") from error
        if self.max_replicas is not None and self.max_replicas < self.replicas:
            raise ValueError(
                f"max_replicas is {self.max_replicas}, less than replicas, which is {self.replicas}"
            )
        return self

    def server(self) -> Settings:
        """Of the server in a replica. It knows neither where Ray listens nor by what names it is called."""
        keys = None if self.api_key_file is None else Keys.of_file(Path(self.api_key_file))
        return Settings(host="0.0.0.0", keys=keys, **self.settings)

    def engine(self) -> dict[str, Any]:
        """Arguments of `bedplate.Engine`."""
        given = {name: getattr(self, name) for name in ("threads", "kv", "max_context", "memory_bytes")}
        given["guard_templates"] = True
        return given if self.cache_bytes is None else {**given, "cache_bytes": self.cache_bytes}
