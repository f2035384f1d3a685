"""How long stages report their progress, without knowing who shows it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

Progress = Callable[[str, int | None], AbstractContextManager[Callable[[int], None]]]


def silent(stage: str, tokens: int | None) -> AbstractContextManager[Callable[[int], None]]:
    """Progress that shows nothing: `stage` is about to take `tokens` tokens, None where that is not known before."""
    return nullcontext(lambda tokens_done: None)
