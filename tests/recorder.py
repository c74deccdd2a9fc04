"""A `Reporter` for tests."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Recorder:
    """A `Reporter` that remembers."""

    stages: list[str] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)

    def progress(self, stage: str, done: int, total: int | None) -> None:
        self.stages.append(stage)

    def notice(self, text: str) -> None:
        self.notices.append(text)
