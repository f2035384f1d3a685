"""How long stages report their progress, without knowing who shows it, and how long each took."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field

Progress = Callable[[str, int | None], AbstractContextManager[Callable[[int], None]]]


def silent(stage: str, tokens: int | None) -> AbstractContextManager[Callable[[int], None]]:
    """Progress that shows nothing: `stage` is about to take `tokens` tokens, None where that is not known before."""
    return nullcontext(lambda tokens_done: None)


@dataclass
class Clock:
    """Seconds each stage took."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a stage, without those that are timed inside it."""
        started, others = time.perf_counter(), sum(self.seconds.values())
        try:
            yield
        finally:
            inside = sum(self.seconds.values()) - others
            self.seconds[name] = round(time.perf_counter() - started - inside, 3)
