"""The one way in which a checkpoint gets its name: written beside it, tested there, and only then renamed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from excise.artefacts import atomic_path
from excise.surgery.proof import Report, require_passed

Test = Callable[[Path], Report]


@dataclass
class Publication:
    """A checkpoint on its way to its name.

    Attributes:
        place: where to write it.
        report: what its test found, once it was tested.

    """

    place: Path
    report: Report | None = None

    @property
    def told(self) -> Report:
        """The report under `self_test`, for the facts of whoever writes; empty where nothing was tested."""
        return {} if self.report is None else {"self_test": self.report}


@contextlib.contextmanager
def publishing(out: Path, test: Test | None = None) -> Iterator[Publication]:
    """Yield a temporary place to write to; what lies there at the end is tested, and then renamed to `out`.

    Args:
        out: the final name.
        test: takes the path of what was written, and gives what `excise.surgery.proof.Proof.report` does.

    Raises:
        SelfTestError: the test failed; nothing is left, and what `out` held before is still there.
        OutputError: see `excise.artefacts.atomic_path`.

    """
    with atomic_path(out) as place:
        publication = Publication(place)
        yield publication
        if test is not None:
            publication.report = test(place)
            require_passed(publication.report, out)
