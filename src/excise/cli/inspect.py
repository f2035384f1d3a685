"""`excise inspect`: the stack as a table."""

from __future__ import annotations

import json

import typer

from excise.cli.options import AsJson, Device, Dtype, Model, TrustRemoteCode


def inspect(
    model: Model,
    dtype: Dtype = "auto",
    device: Device = "auto",
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Show the blocks of a model: kind, sublayers, parameters, bytes, whether removable."""
    from excise.cli.terminal import load_model, output
    from excise.report.tables import human_bytes, stack_table

    stack = load_model(model, dtype=dtype, device=device, trust_remote_code=trust_remote_code).stack
    removable = range(len(stack.blocks)) if len(stack.blocks) > 1 else range(0)
    total = sum(p.numel() for p in stack.model.parameters())
    if as_json:
        rows = [
            {
                "index": b.index,
                "kind": b.kind,
                "sublayers": [s.kind for s in b.sublayers],
                "parameters": b.parameters,
                "bytes": b.bytes,
                "removable": b.index in removable,
            }
            for b in stack.blocks
        ]
        facts = {"model_type": stack.model.config.model_type, "parameters": total, "blocks": rows}
        typer.echo(json.dumps(facts))
        return
    output.print(stack_table(stack, removable))
    in_blocks = sum(b.parameters for b in stack.blocks)
    output.print(
        f"{stack.model.config.model_type}: {len(stack.blocks)} blocks, {len(stack.sublayers)} gates, "
        f"{total:,} parameters ({in_blocks / total:.0%} in blocks, {human_bytes(stack.blocks[0].bytes)} a block)"
    )
