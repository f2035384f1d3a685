"""From a pruned checkpoint and a teacher to a healed checkpoint with its evidence."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path

import torch
from accelerate import PartialState

from excise.artefacts import MADE_BY, digest, read_json, write_artefact
from excise.artefacts.provenance import provenance
from excise.context import Context
from excise.data.batches import longest_together
from excise.data.samples import Samples
from excise.drawing.chart import write_chart
from excise.drawing.loss_curves import loss_curves
from excise.errors import InputError, SelfTestError
from excise.healing.origin import origin_of, recipe_of
from excise.healing.settings import Settings
from excise.healing.sharding import whole
from excise.healing.teachers import OnlineTeacher, Teacher
from excise.healing.trainer import Watching, train, training_place
from excise.measuring.measure import Measurements, measure
from excise.measuring.ratios import by_domain
from excise.models.identity import model_identity
from excise.models.loading import Loaded
from excise.models.stack import Stack
from excise.plain import Facts, Values
from excise.store import Store
from excise.surgery.card import model_card, original_metadata
from excise.surgery.check import check_loaded
from excise.surgery.checkpoint import RECIPE, write_pruned
from excise.surgery.feasible import require_writable
from excise.surgery.publish import publishing
from excise.team import Team
from excise.text import markdown_text

MANIFEST, CURVE = "heal.json", "loss.svg"


def heal(
    student: Loaded,
    teacher: Teacher,
    samples: Samples,
    held_out: Samples,
    out: str | Path,
    settings: Settings,
    *,
    store: Store | None = None,
    further: Values | None = None,
    force: bool = False,
    watching: Watching | None = None,
) -> Facts:
    """Train a pruned model to predict what its original does, and write it as an ordinary checkpoint.

    The folder appears when all is done: the checkpoint, `heal.json` and the loss curve. Until then the training lies
    in the store; the same call goes on from there.

    Args:
        student: the pruned model as loaded from its checkpoint, in float32; its weights change.
        teacher: the original, or a recording of it.
        samples: to train on.
        held_out: other samples, on which the loss is measured before and after.
        out: folder to write.
        settings: hyper-parameters.
        store: for the unfinished training, deleted at the end; by default `.NAME.work` beside `out`. That of a race
            lets the winner go on.
        further: other facts for `heal.json`; `made_by`, the key of the job, for the recipe too.
        force: replace a checkpoint in `out`, an equal one too.
        watching: who is told of its progress.

    Returns:
        What is written to `heal.json`; read from there where `out` was healed so before. In a process other than the
        first of several: an empty dictionary.

    Raises:
        OutputError: `out` exists, and was healed otherwise.
        HealingError: training cannot go on; names the last whole checkpoint.
        InputError: the student's recipe does not explain the teacher; see also `excise.healing.trainer.train`.
        SelfTestError: what was written failed its test; the training is kept.

    """
    out, started = Path(out).expanduser(), time.perf_counter()
    job = job_of(student, teacher, samples, held_out, settings)
    if not force and (found := finished(out, job)):
        return found
    require_writable(student.folder or student.source, out, changes=student.stack.model, overwrite=force)
    recipe, origin = recipe_of(student), origin_of(student, teacher)
    store = store or Store(out.with_name(f".{out.name}.work"))
    work = training_place(store, student.stack, teacher, samples, settings)
    judged: dict[str, Measurements] = {}
    if isinstance(teacher, OnlineTeacher):
        judged["original"] = _measured(Loaded.of(teacher.stack), held_out)
    judged["pruned"] = _measured(student, held_out)
    curve = train(
        student.stack,
        teacher,
        samples,
        work,
        settings,
        origin=origin,
        watching=watching,
    )
    if not PartialState().is_main_process:
        PartialState().wait_for_everyone()
        return {}
    student = whole(student, work)
    judged["healed"] = _measured(student, held_out)
    facts = {
        "job": job,
        "student": student.source,
        "losses": {name: found.loss() for name, found in judged.items()},
        "domains": {name: by_domain(found.of(), found.counts, held_out.domains) for name, found in judged.items()},
        "steps": len(curve),
        "settings": asdict(settings),
        "teacher": teacher.describe(),
        "samples": samples.describe(),
        "held_out": held_out.describe(),
        "curve": curve,
        **(further or {}),
        "provenance": provenance(),
    }
    try:
        facts = _write(student, recipe, facts, out, longest_together(held_out), started)
    except SelfTestError as error:
        raise SelfTestError(f"{error}. The training is kept in {work}") from None
    store.delete()
    PartialState().wait_for_everyone()
    return facts


def job_of(student: Loaded, teacher: Teacher, samples: Samples, held_out: Samples, settings: Settings) -> str:
    """Key of everything that determines a healing."""
    inputs = [model_identity(student.stack.model), teacher.describe(), samples.hash, held_out.hash]
    return digest([*inputs, asdict(settings)])


def finished(out: Path, job: str) -> Facts:
    """What an equal healing wrote to `out`; empty where none did."""
    facts = read_json(out / MANIFEST) if (out / MANIFEST).is_file() else {}
    return facts if facts.get("job") == job else {}


def _measured(loaded: Loaded, samples: Samples) -> Measurements:
    # By this process alone: what was trained is measured by the first only.
    return measure(Context(loaded, team=Team()), samples, [()])


def _write(student: Loaded, recipe: Values, facts: Facts, out: Path, probe: torch.Tensor, started: float) -> Facts:
    """Write the checkpoint, its card, its curve and its facts as one folder, which is tested; returns the facts."""
    told = {key: facts[key] for key in ("losses", "domains", "steps", "settings")}
    healing = {**told, "samples": facts["samples"], "teacher": facts["teacher"]}

    def tested(folder: Path) -> Facts:
        report = check_loaded(student.stack, (), folder, probe, source=student.folder, stored=student.stored_dtype)
        facts["self_test"] = report
        facts["seconds"] = round(time.perf_counter() - started, 1)
        write_artefact(folder / MANIFEST, facts)
        return report

    with publishing(out, tested) as publication:
        folder = publication.place
        written = write_pruned(
            student.stack,
            (),
            folder,
            source=student.folder,
            tokenizer=student.tokenizer,
            dtype=student.stored_dtype,
            card={"original": student.source},
        )
        # One recipe tells of a pruning and of the healing after it; a second healing is another step.
        before = recipe if recipe and "healing" not in recipe else written
        after = {**before, "healing": healing, "dtype": written["dtype"], MADE_BY: facts.get(MADE_BY)}
        if "zeroed_sublayers" in after:
            after["zeroed_sublayers"] = _still_zero(student.stack, after)
        write_artefact(folder / RECIPE, after)
        metadata = original_metadata(student.folder or student.source)
        card = model_card(after, name=out.name, original=metadata) + _section(facts)
        (folder / "README.md").write_text(card, encoding="utf-8")
        held_out = ", ".join(f"{name} {value:.3f}" for name, value in facts["losses"].items())
        if chart := loss_curves({out.name: facts["curve"]}, f"Held out, nats/token: {held_out}."):
            write_chart(chart, folder / CURVE)
    return facts


def _still_zero(stack: Stack, recipe: Values) -> list[str]:
    """Of the sublayers that had been set to 0, those to which training gave no weights."""
    named = {f"{recipe['original_blocks'][s.block]}.{s.kind}": s for s in stack.sublayers}

    def is_zero(name: str) -> bool:
        module = stack.blocks[named[name].block].module
        return not any(module.get_parameter(weight).count_nonzero() for weight in named[name].writes)

    return [name for name in recipe["zeroed_sublayers"] if name in named and is_zero(name)]


TRAINED = {
    "all": "all parameters",
    "lora": "LoRA, merged",
    "cuts": "the blocks next to a cut",
    "refitted": "the matrices next to the cuts, and the gains of norms",
    "last": "the last three blocks and the head",
}


def _section(facts: Values) -> str:
    losses, settings, teacher = facts["losses"], facts["settings"], facts["teacher"]
    kinds = sorted(facts["domains"]["healed"])
    # Samples without categories are of one kind, which has no name.
    kinds = kinds if len(kinds) > 1 else []
    head = ("model", "held-out loss, nats/token", *map(markdown_text, kinds))
    lines = [head, ("---",) * len(head)]
    for name, value in losses.items():
        lines.append((name, f"{value:.4f}", *(f"{facts['domains'][name][kind]:.3f}" for kind in kinds)))
    rows = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    trained = TRAINED[settings["train"]]
    return (
        f"\n## Healing\n\nTrained by distillation from the original ({teacher['kind']} teacher): {facts['steps']} "
        f"steps of {settings['batch']} samples, AdamW at {settings['learning_rate']:g}, {trained}.\n\n"
        f"{rows}"
    )


def require_same_vocabulary(student: Stack, teacher: Stack) -> None:
    """Refuse a teacher that does not predict the student's tokens.

    Raises:
        InputError: their vocabularies differ in size.

    """
    sizes = [stack.model.config.get_text_config().vocab_size for stack in (student, teacher)]
    if sizes[0] != sizes[1]:
        raise InputError(
            f"the student predicts {sizes[0]} tokens and the teacher {sizes[1]}; expected the student's own original"
        )
