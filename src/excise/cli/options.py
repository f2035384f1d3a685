"""Options that several verbs share, and how their text becomes values."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from excise.errors import OutputError
from excise.settings import budgets as budgets
from excise.settings import indices as indices

Model = Annotated[str, typer.Argument(help="A checkpoint folder, a .gguf file, or a hub id.", show_default=False)]
Data = Annotated[
    str,
    typer.Option(
        help="'starter' (shipped, offline), a JSONL(.gz) file of chats or texts, a text file, a folder, "
        "or a hub data set id such as teknium/OpenHermes-2.5 (add @split for a split other than train)."
    ),
]
SampleCount = Annotated[int, typer.Option("--samples", min=1, help="Calibration samples.")]
TokenLimit = Annotated[int, typer.Option("--tokens", min=0, help="Longest sample in tokens; 0 for no limit.")]
LossOn = Annotated[
    str,
    typer.Option(
        help="Tokens that count: 'content' (all but what the chat template puts before a chat), 'all' (as in "
        "the paper) or 'responses'."
    ),
]
Seed = Annotated[int, typer.Option(help="Seed of everything random.")]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16, float16 or float64: of the computation.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, …; auto spreads a large model over all GPUs.")]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run Python code that comes with the model.")
]
BatchTokens = Annotated[
    int | None, typer.Option(min=1, help="Tokens that go through the model at once; by default what keeps it busy.")
]
Checkpointing = Annotated[
    bool, typer.Option("--checkpointing", help="Recompute blocks in the backward pass: less memory, a third more time.")
]
Protect = Annotated[str, typer.Option(help="Blocks never removed, such as 0,1,-1 (negative ones count from the top).")]
ForceBlocks = Annotated[str, typer.Option("--force-blocks", help="Blocks always removed; they count towards --remove.")]
ObjectiveText = Annotated[
    str,
    typer.Option(
        "--objective",
        help="Damage to keep low: kl, loss, choices (needs --questions), or a mixture: kl:0.7,choices:0.3.",
    ),
]
Questions = Annotated[
    Path | None, typer.Option(help="Multiple-choice questions (JSONL) for the objective choices; a training split.")
]
Domains = Annotated[
    str, typer.Option(help="mean, or worst: the objective is that of the worst of the data's categories.")
]
Effort = Annotated[
    float, typer.Option(min=0.0, help="What refinement may cost, in passes over the calibration samples.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on standard output instead of a table.")]
Force = Annotated[bool, typer.Option("--force", "--overwrite", help="Replace what is there already.")]


def check_new(path: Path, force: bool) -> None:
    """Refuse to overwrite a file.

    Raises:
        OutputError: it exists, and `force` was not given.

    """
    if path.exists() and not force:
        raise OutputError(f"{path} exists; choose another --out, or pass --force to replace it")
