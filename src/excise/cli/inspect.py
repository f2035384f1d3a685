"""`excise inspect`: the stack as a table."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import typer

from excise.artefacts import json_text
from excise.settings import Loading, Printing, option


@dataclass(frozen=True, kw_only=True)
class InspectSettings(Printing, Loading):
    """Settings of `excise inspect`."""

    find: bool = option(False, "Propose the record of an unknown architecture from a forward pass.")


def inspect(settings: InspectSettings) -> None:
    """Show the blocks of a model: kind, sublayers, parameters, bytes, whether removable."""
    if settings.find:
        _propose(settings)
        return
    from excise.cli.terminal import load_model, output
    from excise.models.architectures.readers import READERS
    from excise.models.constraints import listed
    from excise.models.portable import rules_of
    from excise.report.tables import human_bytes, stack_table

    loaded = load_model(settings.model, **settings.loading())
    stack = loaded.stack
    rules = rules_of(stack.architecture, stack.model.config, loaded.raw_config)
    removable = [b.index for b in stack.blocks if b.index not in stack.fixed] if len(stack.blocks) > 1 else []
    total = sum(p.numel() for p in stack.model.parameters())
    if settings.as_json:
        rows = [
            {
                "index": b.index,
                "kind": b.kind,
                "sublayers": [s.kind for s in b.sublayers],
                "parameters": b.parameters,
                "bytes": b.bytes,
                "removable": b.index in removable,
                "fixed": stack.fixed.get(b.index),
            }
            for b in stack.blocks
        ]
        facts = {"model_type": stack.model.config.model_type, "parameters": total, "blocks": rows}
        facts["one_of_these_must_stay"] = stack.needed
        facts["readers"] = rules
        typer.echo(json_text(facts))
        return
    output.print(stack_table(stack, removable))
    in_blocks = sum(b.parameters for b in stack.blocks)
    output.print(
        f"{stack.model.config.model_type}: {len(stack.blocks)} blocks, {len(stack.sublayers)} gates, "
        f"{total:,} parameters ({in_blocks / total:.0%} in blocks, {human_bytes(stack.blocks[0].bytes)} a block)"
    )
    for block, reason in sorted(stack.fixed.items()):
        output.print(f"block {block} stays: {reason}")
    if stack.needed:
        output.print(f"one of blocks {listed(stack.needed)} must stay: the cache counts its tokens there")
    anywhere = ", ".join(READERS[name].title for name, found in rules.items() if not found)
    output.print(f"every removal is right in {anywhere}")
    for name, found in rules.items():
        for rule in found:
            output.print(f"in {READERS[name].title} only what keeps its pattern: {rule} (--portable {name})")


def _propose(settings: InspectSettings) -> None:
    from excise.cli.terminal import status
    from excise.models.architectures import HOW_TO_ADD
    from excise.models.finder import find_record
    from excise.models.loading import load_unread

    with status(f"loading {settings.model}"):
        loaded, _, _ = load_unread(settings.model, **settings.loading())
    found = find_record(loaded)
    if settings.as_json:
        typer.echo(json_text({**asdict(found), "record": found.record()}))
        return
    typer.echo(found.record())
    typer.echo(f"# checked by a forward pass: with these outputs at 0, every block returns its input. {HOW_TO_ADD}")
