"""Benchmarks through the Python API of lm-eval (Gao et al., the language model evaluation harness), an optional extra.

Nothing here scores anything itself: a result is what `lm_eval.simple_evaluate` returns for the same task and settings.
"""

from __future__ import annotations

import importlib.metadata
import math
import os
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from logging import ERROR, getLogger
from pathlib import Path
from typing import Any

from accelerate import Accelerator, InitProcessGroupKwargs

from excise.errors import InputError
from excise.evaluation.inputs import task_identity
from excise.evaluation.scores import Metric, Result
from excise.ising.bridges.extras import require
from excise.models.loading import Loaded
from excise.plain import Facts, Values

TASK_SETS = {
    # Table 1 of the paper, and the two benchmarks of its Fig. 5.
    "paper": ("mmlu", "hellaswag", "winogrande", "arc_challenge", "leaderboard_bbh", "gsm8k"),
    "paper-moe": ("gpqa_diamond_cot_zeroshot", "aime25"),
}
# lm-eval's search for the largest batch starts at 64 sequences of full length: minutes on a CPU (log, 2026-11-24,
# evaluation).
CPU_BATCH = 8


def task_names(text: str) -> tuple[str, ...]:
    """Names of tasks from a list separated by commas, in which a set's name stands for its tasks.

    Examples:
        >>> task_names("paper-moe,lambada_openai")
        ('gpqa_diamond_cot_zeroshot', 'aime25', 'lambada_openai')

    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    return tuple(dict.fromkeys(task for name in names for task in TASK_SETS.get(name, (name,))))


def _tell_of_code(folder: Path) -> None:
    """Task files may name functions of Python files beside them (`!function`), which lm-eval runs."""
    found = (path for path in sorted(folder.rglob("*.y*ml")) if path.is_file())
    files = [path for path in found if b"!function" in path.read_bytes()]
    if files:
        named = ", ".join(str(path.relative_to(folder)) for path in files[:5]) + (", …" if len(files) > 5 else "")
        warnings.warn(f"Python code beside these task files of {folder} will run: {named}", stacklevel=3)


def task_manager(tasks: Sequence[str], include_path: Path | None = None) -> Any:
    """Find the tasks, before any model is loaded.

    Args:
        tasks: names of tasks, groups or tags.
        include_path: a folder with task files (YAML) of one's own, besides those of lm-eval.

    Returns:
        An `lm_eval.tasks.TaskManager`.

    Raises:
        InputError: a task is unknown, or there is no such folder.
        MissingExtraError: lm-eval is not installed.

    """
    if include_path is not None and not include_path.is_dir():
        raise InputError(f"--include-path expects a folder of task files (YAML), got {include_path}")
    if include_path is not None:
        _tell_of_code(include_path)
    with _quiet():
        manager = require("lm_eval.tasks", "eval").TaskManager(include_path=str(include_path) if include_path else None)
    unknown = [task for task in tasks if task not in manager.task_index]
    if unknown:
        raise InputError(
            f"unknown tasks {', '.join(unknown)}; sets: {', '.join(TASK_SETS)}; `lm_eval ls tasks` lists the others, "
            f"--include-path adds your own"
        )
    return manager


def harness_settings(manager: Any, task: str, shots: int | None, limit: int | None, chat_template: bool) -> Facts:
    """What a benchmark's score depends on beside the model.

    Args:
        manager: from `task_manager`.
        task: its name.
        shots: examples in the prompt; None leaves each task its own number.
        limit: samples a task; None takes all.
        chat_template: put prompts through the tokenizer's chat template, shots as turns of the chat.

    """
    return {
        "task": task_identity(manager, task),
        "shots": shots,
        "limit": limit,
        "chat_template": chat_template,
        "lm_eval": importlib.metadata.version("lm_eval"),
    }


def harness_model(loaded: Loaded, batch_size: str = "auto") -> Any:
    """A loaded model as lm-eval's `HFLM`; under `accelerate launch` every process takes its share of the samples.

    Args:
        loaded: the model, on the device of this process.
        batch_size: sequences at once; "auto" is 8 on a CPU, and on a GPU what lm-eval finds to fit.

    Raises:
        InputError: a batch size that is neither a number nor auto.
        MissingExtraError: lm-eval is not installed.

    """
    huggingface = require("lm_eval.models.huggingface", "eval")
    if batch_size != "auto" and not (batch_size.isdigit() and int(batch_size) > 0):
        raise InputError(f"--batch-size expects a number or auto, got '{batch_size}'")
    model = loaded.stack.model
    if batch_size == "auto" and model.device.type == "cpu":
        batch_size = str(CPU_BATCH)
    with _quiet():
        lm = huggingface.HFLM(pretrained=model, tokenizer=loaded.tokenizer, batch_size=batch_size)
    if (accelerator := processes()) is not None:
        # HFLM leaves this to its caller where the model comes ready made.
        lm.accelerator = accelerator
        lm._rank, lm._world_size = accelerator.process_index, accelerator.num_processes
    return lm


def processes() -> Any:
    """The `accelerate.Accelerator` of this process, or None where it was not started by `accelerate launch`."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return None
    # One process may measure alone for long while the others wait for it.
    return Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(weeks=1))])


def benchmark(
    lm: Any, task: str, settings: Values, manager: Any, *, fingerprint: str, bootstrap: int = 100_000
) -> Result | None:
    """Run one task (or group, or tag).

    Args:
        lm: from `harness_model`.
        task: its name.
        settings: from `harness_settings`.
        manager: from `task_manager`.
        fingerprint: the model's hash.
        bootstrap: resamplings for the errors of metrics that are no means; lm-eval's default.

    Returns:
        The result; None in the processes of `accelerate launch` other than the first.

    Raises:
        InputError: the task failed, most often because its data set cannot be downloaded.

    """
    started = time.perf_counter()
    try:
        with _quiet():
            found = require("lm_eval", "eval").simple_evaluate(
                model=lm,
                tasks=[task],
                num_fewshot=settings["shots"],
                limit=settings["limit"],
                apply_chat_template=settings["chat_template"],
                task_manager=manager,
                bootstrap_iters=bootstrap,
                log_samples=False,
            )
    # A task runs code of its own and a download, which raise whatever they like.
    except Exception as error:
        raise InputError(
            f"task {task} failed ({type(error).__name__}: {_first_line(error)}); "
            f"what was measured before is kept, and the same command goes on from there"
        ) from error
    if found is None:
        return None
    row = found["results"].get(task) or found.get("groups", {}).get(task)
    if row is None:
        members = ", ".join(sorted(found["results"])[:4])
        raise InputError(f"{task} is a tag, which has no score of its own; name its tasks instead ({members}, …)")
    details = {
        "samples": sum(count["effective"] for count in found["n-samples"].values()),
        "of_samples": sum(count["original"] for count in found["n-samples"].values()),
        "shots": _common(found["n-shot"]),
        "version": found["versions"].get(task),
        "dataset": _dataset(found, task),
        "subtasks": {
            name: _plain_metrics(_metrics(values, _directions(found, name)))
            for name, values in found["results"].items()
            if name != task
        },
        "seconds": round(time.perf_counter() - started, 3),
    }
    metrics = _metrics(row, _directions(found, task))
    return Result(fingerprint, "benchmark", task, dict(settings), metrics, details)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), "no message")


def _dataset(found: Values, task: str) -> Facts:
    """Where the samples come from: of a group, what its tasks have in common."""
    configs = [found["configs"][task]] if task in found["configs"] else list(found["configs"].values())
    facts = {"path": "dataset_path", "name": "dataset_name", "split": "test_split"}
    values = {name: {config.get(key) for config in configs} for name, key in facts.items()}
    return {name: value.pop() if len(value) == 1 else None for name, value in values.items()}


def _directions(found: Values, task: str) -> Values:
    return found.get("higher_is_better", {}).get(task) or {}


def _metrics(row: Values, directions: Values) -> dict[str, Metric]:
    metrics = {}
    for name, value in row.items():
        metric, comma, filtered = name.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        error = row.get(f"{metric}_stderr,{filtered}")
        stderr = float(error) if isinstance(error, int | float) and math.isfinite(error) else None
        metrics[name] = Metric(float(value), stderr, directions.get(metric) is not False)
    return metrics


def _plain_metrics(metrics: Mapping[str, Metric]) -> dict[str, list[float | None]]:
    return {name: [metric.value, metric.stderr] for name, metric in metrics.items()}


def _common(shots: Mapping[str, int]) -> int | None:
    distinct = set(shots.values())
    return distinct.pop() if len(distinct) == 1 else None


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence advice that lm-eval logs about every call; its errors are raised."""
    logger = getLogger("lm_eval")
    level = logger.level
    logger.setLevel(ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
