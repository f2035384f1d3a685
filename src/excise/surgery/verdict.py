"""What a self-test proved, in words, and publishing only what did not fail it.

Three things are told apart: what was proved, what could not be tested here and why (a warning), and what failed. A
checkpoint that failed never gets its name.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from excise.artefacts import atomic_path
from excise.errors import SelfTestError

Report = dict[str, Any]

# Shares of the largest logit. Weights that a file keeps in 16 bits come back rounded; else both sides compute the same.
TOLERANCE, TOLERANCE_IN_HALF = 1e-3, 5e-2

WORDS = {
    "logits": "logits equal those of the original with these blocks switched off",
    "names": "every weight is found by name and shape",
    "none": "nothing could be tested",
}


def judged(report: Mapping[str, Any]) -> Report:
    """A report with its verdict.

    Args:
        report: of `excise.surgery.check` or `excise.surgery.self_test`.

    Returns:
        The same with `passed` (whether nothing failed), `proof` (what was proved, in words), `failures` and `untested`
        (sentences).

    """
    level = report.get("level", "logits")
    failures = [*_keys(report), *(_logits(report) if level == "logits" else ()), *_generation(report)]
    if report.get("tokenizer_loads") is False:
        failures.append(f"its tokenizer does not load: {report.get('tokenizer_reason', 'it gives no tokens')}")
    proof = WORDS[level]
    if level == "logits" and report.get("cache_agrees"):
        proof += ", and greedy generation agrees with and without cache"
    return {
        **report,
        "level": level,
        "passed": not failures,
        "proof": proof,
        "failures": failures,
        "untested": _untested(report),
    }


def _keys(report: Mapping[str, Any]) -> list[str]:
    said = {"missing_keys": "misses", "mismatched_keys": "has other shapes for", "unexpected_keys": "does not know"}
    found = []
    for kind, verb in said.items():
        if names := report.get(kind):
            found.append(f"stock transformers {verb} {len(names)} weights (first: {', '.join(map(str, names[:3]))})")
    return found


def _logits(report: Mapping[str, Any]) -> list[str]:
    difference, scale = report["max_abs_logit_difference"], report["max_abs_logit"]
    if not (math.isfinite(difference) and math.isfinite(scale)):
        return ["logits are not finite: weights are NaN or infinite, or overflow in the dtype of the computation"]
    allowed = report.get("tolerance", TOLERANCE) * max(1.0, scale)
    if difference <= allowed:
        return []
    return [f"logits differ by {difference:.3g} from the original's with these blocks off; {allowed:.3g} is rounding"]


def _generation(report: Mapping[str, Any]) -> list[str]:
    if report.get("cache_agrees") is not False or report.get("original_cache_agrees") is False:
        return []
    return ["greedy generation differs with and without cache, where the original's does not"]


def _untested(report: Mapping[str, Any]) -> list[str]:
    reasons = [report["reason"]] if report.get("reason") else []
    if report.get("generation_reason"):
        reasons.append(f"generation: {report['generation_reason']}")
    if report.get("cache_agrees") is False and report.get("original_cache_agrees") is False:
        reasons.append("generation: the original itself differs with and without cache")
    return reasons


def publish(out: str | Path, write: Callable[[Path], Report], test: Callable[[Path], Report] | None) -> Report:
    """Write, test what was written, and only then give it its name.

    Args:
        out: folder or file to write; what is there is replaced.
        write: writes to the path given, whose last part is that of `out`; returns the recipe.
        test: tests what lies at the path given; None for no test.

    Returns:
        The recipe, with the verdict as `self_test`.

    Raises:
        SelfTestError: the test failed; nothing was left at `out`.

    """
    out = Path(out)
    with atomic_path(out) as place:
        recipe = write(place)
        if test is None:
            return recipe
        report = require_passed(test(place), out)
    return {**recipe, "self_test": report}


def require_passed(report: Mapping[str, Any], out: Path) -> Report:
    """The report with its verdict; what could not be tested is warned of.

    Raises:
        SelfTestError: something failed.

    """
    verdict = judged(report)
    if not verdict["passed"]:
        raise SelfTestError(f"{out} fails its self-test and was not written: {'; '.join(verdict['failures'])}")
    for reason in verdict["untested"]:
        warnings.warn(f"{out.name} was not tested in full ({verdict['proof']}): {reason}", stacklevel=3)
    return verdict
