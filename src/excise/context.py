"""The means of a stage: the model, where results are kept, and how progress is shown; never what is asked of it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property

from excise.data.batches import Batch, default_batch_tokens, make_batches
from excise.data.fit import require_fit
from excise.data.samples import Samples
from excise.models.identity import model_identity
from excise.models.loading import Loaded
from excise.models.room import DISTRIBUTIONS_SHARE, free_memory
from excise.models.stack import Stack
from excise.progress import Progress
from excise.store import Store
from excise.team import Team
from excise.team import team as joined


@dataclass(frozen=True, eq=False)
class Context:
    """What every stage works with.

    Attributes:
        loaded: the model, its tokenizer, and where it came from.
        store: what is kept and found again; by default in memory, as long as this object.
        progress: shows progress.
        batch_tokens: padded tokens per batch; None for what keeps the device busy.
        team: the processes among which passes are divided.
        distribution_bytes: that the intact model's distributions may take, where others are compared with them; None
            for a share of what is free.

    """

    loaded: Loaded
    store: Store = field(default_factory=Store)
    progress: Progress = field(default_factory=Progress)
    batch_tokens: int | None = None
    team: Team = field(default_factory=joined)
    distribution_bytes: int | None = None

    @property
    def stack(self) -> Stack:
        """The model as a stack of blocks."""
        return self.loaded.stack

    @property
    def identity(self) -> str:
        """Hash of the model as it is now."""
        return model_identity(self.stack.model)

    @property
    def tokens_per_batch(self) -> int:
        """Padded tokens that go through the model at once."""
        return self.batch_tokens or default_batch_tokens(self.stack)

    @cached_property
    def distribution_room(self) -> int:
        """Bytes that distributions of the intact model may take; asked once, as the answer decides what is measured."""
        if self.distribution_bytes is not None:
            return self.distribution_bytes
        head = self.stack.model.get_output_embeddings().weight.device
        return self.team.once(lambda: int(DISTRIBUTIONS_SHARE * free_memory(head)))

    def batches(self, samples: Samples) -> list[Batch]:
        """The samples in batches, the same ones each time.

        Raises:
            InputError: a sample that the model cannot take, by name; see `excise.data.fit.Fit`.

        """
        require_fit(samples, self.stack)
        return make_batches(samples, self.tokens_per_batch)

    def finish(self) -> None:
        """Forget everything kept on the way, when all processes are through and the result is written."""
        self.team.wait()
        if self.team.first:
            self.store.delete()

    def of(self, loaded: Loaded) -> Context:
        """The same means for another model."""
        return replace(self, loaded=loaded)
