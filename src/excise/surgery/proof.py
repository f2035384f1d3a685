"""How far a checkpoint was proved to be what it should be: levels, what failed, and what could not be tested."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path

from excise.errors import SelfTestError
from excise.plain import Facts, Values

# From the least to the most, each with those before it.
LEVELS = {
    "files": "its files are whole and every number in them is finite",
    "names": "stock transformers finds every weight by name and shape",
    "logits": "its logits equal those of the original without what was removed",
    "generates": "its logits equal those of the original without what was removed, and it generates the same with and "
    "without KV cache",
}
NOTHING = "none"

Report = Facts


@dataclass
class Proof:
    """What is found out about a checkpoint, while it is found out.

    Attributes:
        proved: names in `LEVELS`.
        failed: what is wrong with it, each as a clause that follows "the checkpoint failed its test: ".
        untested: level, or "tokenizer" → why that could not be tested here.
        facts: figures for the report.

    """

    proved: set[str] = field(default_factory=set)
    failed: list[str] = field(default_factory=list)
    untested: dict[str, str] = field(default_factory=dict)
    facts: Facts = field(default_factory=dict)

    def judge(self, level: str, reason: str | None) -> None:
        """Count a level as proved, or as failed where there is a reason why it is not."""
        if reason is None:
            self.proved.add(level)
        else:
            self.failed.append(reason)

    def leave(self, reason: str, *levels: str) -> None:
        """Say why levels could not be tested; the first reason stays."""
        self.untested = dict.fromkeys(levels, reason) | self.untested

    def report(self) -> Report:
        """Plain data: `passed`, `level`, `failed`, `untested` and the facts.

        The level is the highest that is proved with all below it, "none" if the lowest is not.
        """
        proved = list(takewhile(self.proved.__contains__, LEVELS))
        level = proved[-1] if proved else NOTHING
        summary = {"passed": not self.failed, "level": level, "failed": self.failed, "untested": self.untested}
        return {**summary, **self.facts}


def in_words(report: Values) -> str:
    """What a report says, as one sentence without its full stop.

    Args:
        report: what `Proof.report` gave.

    Examples:
        >>> in_words({"passed": True, "level": "files", "untested": {"names": "no tool", "logits": "no tool"}})
        'passed: its files are whole and every number in them is finite; not tested: names, logits (no tool)'

    """
    if not report["passed"]:
        return f"failed: {'; '.join(report['failed'])}"
    level = report["level"]
    said = f"passed: {LEVELS[level]}" if level in LEVELS else "nothing was proved"
    if report.get("max_abs_logit_difference") is not None:
        said += f"; logits differ by at most {report['max_abs_logit_difference']:.3g}"
    if report.get("loads_in_stock_transformers", True) is None:
        said += "; dequantised by excise, since stock transformers would not read its scales"
    return "; ".join([said, *(f"not tested: {text}" for text in _reasons(report))])


def _reasons(report: Values) -> list[str]:
    """Each reason once, after all that it kept from being tested."""
    by_reason: dict[str, list[str]] = {}
    for name, reason in report["untested"].items():
        by_reason.setdefault(reason, []).append(name)
    return [f"{', '.join(names)} ({reason})" for reason, names in by_reason.items()]


def require_passed(report: Values, out: Path) -> None:
    """Refuse a checkpoint that failed, and warn of what could not be tested.

    Args:
        report: what `Proof.report` gave.
        out: the name that it is to have.

    Raises:
        SelfTestError: something is wrong with it.

    """
    if not report["passed"]:
        raise SelfTestError(
            f"the checkpoint for {out} failed its test: {'; '.join(report['failed'])}. Nothing was written there "
            f"(`excise prune --no-self-test` would)"
        )
    for text in _reasons(report):
        warnings.warn(f"not tested of {out.name}: {text}", stacklevel=3)
