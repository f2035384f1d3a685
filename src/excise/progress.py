"""How long stages report their progress, without knowing who shows it, and how long each took."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field

logger = logging.getLogger(__name__)

Show = Callable[[str, int | None], AbstractContextManager[Callable[[int], None]]]


def silent(stage: str, tokens: int | None) -> AbstractContextManager[Callable[[int], None]]:
    """Show nothing: `stage` is about to take `tokens` tokens, None where that is not known before."""
    return nullcontext(lambda tokens_done: None)


class Progress:
    """One bar at a time: a stage that is opened inside another adds to the outer one's bar.

    Args:
        show: opens a bar over so many tokens, and gives what to call with tokens done.

    """

    def __init__(self, show: Show = silent) -> None:
        self._show = show
        self._advance: Callable[[int], None] | None = None

    @contextmanager
    def stage(self, name: str, tokens: int | None) -> Iterator[Callable[[int], None]]:
        """Open a stage; yields what to call with tokens done."""
        # Inner stages advance the outer bar, so that a stage need not know whether it is part of another.
        if self._advance is not None:
            yield self._advance
            return
        with self._show(name, tokens) as advance:
            self._advance = advance
            try:
                yield advance
            finally:
                self._advance = None


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
            logger.info("%s took %.1f s", name, self.seconds[name])
