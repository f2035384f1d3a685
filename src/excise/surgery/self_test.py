"""The proof that a pruned checkpoint is what it should be, by a fresh process that knows nothing of excise.

Whatever the original does as well is not held against the surgery, save for numbers that are none.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from jaxtyping import Float, Int
from safetensors.torch import save_file
from torch import Tensor

from excise.data.fit import Fit
from excise.errors import InputError, UntestableError
from excise.models.stack import Stack, block_indices, gated
from excise.plain import Values
from excise.surgery.files_test import wrong_files
from excise.surgery.proof import Proof, Report
from excise.surgery.stock_load import TIE, TIE_IN_HALF, compare_generation, said, tokenizer_loads

SEQUENCES, TOKENS, NEW_TOKENS = 4, 32, 12  # reference logits stay below 70 MB at a vocabulary of 128k
STOCK_LOAD = Path(__file__).with_name("stock_load.py")
STOCK_NAMES = Path(__file__).with_name("stock_names.py")
CHILD = Path(__file__).with_name("child.py")
OF_THE_MACHINE = "this machine"  # how `stock_load.said` begins what is not the checkpoint's fault


def self_test(
    stack: Stack,
    removed: Sequence[int],
    folder: str | Path,
    input_ids: Tensor | None = None,
    *,
    sublayers: Sequence[int] = (),
    source: Path | None = None,
    stored: torch.dtype | None = None,
    timeout_s: float = 1800.0,
) -> Report:
    """Load a pruned checkpoint with stock transformers in a fresh process and compare it with the original.

    The reference is the original model with the gates of what is removed at 0: multiplied, not bypassed, so that
    it shares nothing with the surgery. The process is the same interpreter, isolated and offline; the original stays
    in memory meanwhile.

    Args:
        stack: the original model.
        removed: original indices.
        folder: the checkpoint that `write_pruned` wrote.
        input_ids: token ids [sequences, tokens] without padding, of which the first 4 × 32 are used, or as many as the
            model has positions for; None takes random ones, always the same.
        sublayers: gates of sublayers removed by themselves.
        source: the original's folder, if it has one, to tell what it does, too.
        stored: dtype in which weights that changed in memory were written, of which rounding is expected; None where
            none changed.
        timeout_s: seconds the process may take.

    Returns:
        What `excise.surgery.proof.Proof.report` does: `passed`, `level`, `failed`, `untested`; and, as far as they were
        found, `loads_in_stock_transformers` (no missing, unexpected or mismatched keys), `missing_keys`,
        `unexpected_keys`, `mismatched_keys`, `max_abs_logit_difference` and `median_logit_difference` (of positions;
        computed in the original's dtype), `max_abs_logit` (of the reference, for scale), `cache_agrees` (greedy tokens
        and logits with and without KV cache, up to ties), if not, `original_cache_agrees` (some models differ from
        themselves there), `max_abs_cache_difference`, `generated_tokens`, `generated_tokens_equal`, `tokenizer_loads`
        (None without a tokenizer), `without_excise`, `model_class`, `parameters`, `transformers`, `load_seconds`,
        `seconds`.

    Raises:
        InputError: `input_ids` is not [sequences, tokens].

    """
    input_ids, new_tokens = probe(stack, input_ids)
    proof, folder = Proof(), Path(folder)
    proof.judge("files", wrong_files(folder))
    try:
        reference = reference_logits(stack, removed, input_ids, sublayers)
    except Exception as error:  # whatever a model raises
        proof.leave(f"the original itself gives no logits: {said(error)}", "names", "logits", "generates")
        return proof.report()
    with tempfile.TemporaryDirectory(prefix="excise-self-test-") as place:
        file = Path(place) / "reference.safetensors"
        save_file(
            {"input_ids": input_ids.cpu().contiguous(), "logits": reference},
            file,
            metadata=_settings(stack, new_tokens),
        )
        del reference
        try:
            report = in_fresh_process(STOCK_LOAD, folder, str(file), timeout_s=timeout_s)
        except UntestableError as error:
            proof.leave(str(error), "names", "logits", "generates")
            return proof.report()
    errors = {name: report.pop(name) for name in [*report] if name.endswith("_error")}
    proof.facts = report
    _judge_tokenizer(proof, errors.get("tokenizer_error"), source)
    if "load_error" in errors:
        judge_loading(proof, errors["load_error"], source)
        return proof.report()
    proof.judge("names", wrong_names(report))
    rounded = stored if stored is not None and _is_rounded(stack, stored) else None
    judge_numbers(proof, stack, input_ids, errors, new_tokens, rounded)
    return proof.report()


def probe(stack: Stack, input_ids: Tensor | None) -> tuple[Tensor, int]:
    """Token ids [sequences, tokens] to compare on, and how many to generate after them; both within its positions.

    The ids are the first of those given, or random ones, always the same.

    Raises:
        InputError: `input_ids` is not [sequences, tokens].

    """
    fit = Fit.of(stack)
    positions = fit.positions or TOKENS + NEW_TOKENS
    new_tokens = min(NEW_TOKENS, positions // 3)
    tokens = min(TOKENS, positions - new_tokens)
    if input_ids is None:
        generator = torch.Generator().manual_seed(0)
        vocabulary = min(stack.config.vocab_size, fit.vocabulary)
        return torch.randint(vocabulary, (2, tokens), generator=generator), new_tokens
    if input_ids.dim() != 2 or 0 in input_ids.shape:
        raise InputError(f"expected token ids [sequences, tokens], got shape {list(input_ids.shape)}")
    return input_ids[:SEQUENCES, :tokens].long(), new_tokens


def reference_logits(
    stack: Stack, removed: Sequence[int], input_ids: Int[Tensor, "batch tokens"], sublayers: Sequence[int] = ()
) -> Float[Tensor, "batch tokens vocabulary"]:
    """Logits [sequences, tokens, vocabulary] of the original with the gates of what is removed at 0, on the CPU."""
    alpha = torch.ones(len(stack.sublayers))  # on the CPU: a scalar there multiplies a tensor anywhere
    gone = set(block_indices(stack, removed))
    alpha[[s.gate for s in stack.sublayers if s.block in gone or s.gate in sublayers]] = 0
    with torch.no_grad(), gated(stack, alpha):
        return stack.model(input_ids=input_ids.to(stack.device), use_cache=False).logits.cpu().contiguous()


def judge_loading(proof: Proof, error: str, source: Path | None, *options: str) -> None:
    """Judge that stock transformers does not load the checkpoint; what it says of the original's folder decides.

    Args:
        proof: to go on with.
        error: what was raised.
        source: the original's folder, if it has one.
        options: of `excise.surgery.stock_names`.

    """
    levels = ("names", "logits", "generates")
    if source is not None and not error.startswith(OF_THE_MACHINE):
        try:
            original = in_fresh_process(STOCK_NAMES, source, *options, timeout_s=600.0)
        except UntestableError as reason:
            original = {"load_error": str(reason)}
        if "load_error" in original:
            proof.leave(f"stock transformers does not load the original, either: {original['load_error']}", *levels)
            return
    _blame(proof, error, "it does not load in stock transformers", *levels)


def wrong_names(report: Values) -> str | None:
    """Say which weights are not where stock transformers looks for them; None where all are."""
    kinds = {"missing_keys": "missing", "unexpected_keys": "unexpected", "mismatched_keys": "of another shape"}
    wrong = [f"{len(report[k])} {name} (first: {report[k][0]})" for k, name in kinds.items() if report[k]]
    return f"stock transformers does not find every weight: {', '.join(wrong)}" if wrong else None


def judge_numbers(
    proof: Proof,
    stack: Stack,
    input_ids: Tensor,
    errors: Mapping[str, str],
    new_tokens: int,
    rounded: torch.dtype | None = None,
) -> None:
    """Judge logits and generation, whose figures are in the proof's facts; the original is asked where it matters.

    Args:
        proof: to go on with.
        stack: the original.
        input_ids: [sequences, tokens] that were compared on.
        errors: what was raised: `logits_error`, `generation_error`.
        new_tokens: how many were to be generated; 0 where the model has no positions for any.
        rounded: dtype to which weights were rounded when written; None where none was.

    """
    if "logits_error" in errors:
        _blame(proof, errors["logits_error"], "it gives no logits", "logits")
    else:
        _judge_logits(proof, stack.model.dtype, rounded or stack.model.dtype)
    if new_tokens == 0:
        proof.leave("the model has too few positions", "generates")
    elif "generation_error" not in errors and proof.facts["cache_agrees"]:
        proof.judge("generates", None)
    else:
        _judge_generation(proof, stack, input_ids, errors.get("generation_error"), new_tokens)


def _is_rounded(stack: Stack, stored: torch.dtype) -> bool:
    """Whether some weight is another one in the dtype in which it was written."""
    weights = (p.detach() for p in stack.model.parameters() if p.is_floating_point() and not p.is_meta)
    return any(not torch.equal(weight.to(stored).to(weight.dtype), weight) for weight in weights)


def _judge_logits(proof: Proof, computed: torch.dtype, stored: torch.dtype) -> None:
    facts = proof.facts
    if not facts["logits_finite"]:
        also = "" if facts["reference_finite"] else ", as those of the original with what was removed at 0"
        proof.judge("logits", f"its logits are not finite (NaN or infinite){also}")
    elif not facts["reference_finite"]:
        proof.leave("the original's own logits are not finite", "logits")
    else:
        # Rounding may send single positions to other experts, so where there was any, half of them must agree.
        exact = {computed, stored} <= TIE.keys()
        tolerance = max(TIE[computed], TIE[stored]) if exact else TIE_IN_HALF
        difference = facts["max_abs_logit_difference" if exact else "median_logit_difference"]
        limit = tolerance * facts["max_abs_logit"]
        wrong = None
        if difference is None or difference > limit:
            found = "without bound" if difference is None else f"by {difference:.3g}"
            wrong = (
                f"its logits differ from those of the original without what was removed {found} (at most {limit:.3g})"
            )
        proof.judge("logits", wrong)


def _judge_generation(proof: Proof, stack: Stack, input_ids: Tensor, error: str | None, new_tokens: int) -> None:
    """Some models do not generate, or not the same with a cache; then this one need not, either."""
    if error is not None and error.startswith(OF_THE_MACHINE):
        proof.leave(error, "generates")
        return
    try:
        original = compare_generation(stack.model, input_ids.to(stack.device), new_tokens)
    except Exception as reason:  # whatever a model raises
        proof.leave(f"the original itself does not generate: {said(reason)}", "generates")
        return
    if error is not None:
        proof.judge("generates", f"it does not generate: {error}")
        return
    proof.facts["original_cache_agrees"] = original["cache_agrees"]
    if original["cache_agrees"]:
        proof.judge("generates", "it generates otherwise with KV cache than without, and the original does not")
    else:
        proof.leave("the original itself generates otherwise with KV cache than without", "generates")


def _judge_tokenizer(proof: Proof, error: str | None, source: Path | None) -> None:
    if proof.facts["tokenizer_loads"] is None:
        proof.leave("there is none", "tokenizer")
    elif error is not None:
        of_source = {} if source is None else tokenizer_loads(str(source))
        if of_source.get("tokenizer_loads") is False:
            proof.leave(f"the original's does not load, either: {of_source['tokenizer_error']}", "tokenizer")
        else:
            _blame(proof, error, "its tokenizer does not load", "tokenizer")


def _blame(proof: Proof, error: str, what: str, *levels: str) -> None:
    """Count an error as the checkpoint's, unless it is the machine's."""
    if error.startswith(OF_THE_MACHINE):
        proof.leave(error, *levels)
    else:
        proof.failed.append(f"{what}: {error}")


def _settings(stack: Stack, new_tokens: int) -> dict[str, str]:
    attention = getattr(stack.model.config, "_attn_implementation", None)
    return {
        "dtype": str(stack.model.dtype).removeprefix("torch."),
        "attention": attention if attention in ("eager", "sdpa") else "",
        "device_map": "auto" if stack.device.type == "cuda" else "",
        "new_tokens": str(new_tokens),
        # Its own code ran when the original was loaded, by leave of the user; the pruned model carries the same.
        "trust_remote_code": "yes" if type(stack.model).__module__.startswith("transformers_modules.") else "",
    }


def in_fresh_process(script: Path, folder: Path, *arguments: str, timeout_s: float) -> Report:
    """Run a script on a checkpoint folder, by the same interpreter, isolated and offline; return the JSON it prints.

    The process dies with this one.

    Raises:
        UntestableError: it ends without a report, or takes too long.

    """
    command = [sys.executable, "-I", str(CHILD), str(script), str(folder.resolve()), *arguments]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    read_end, write_end = os.pipe()
    try:
        done = subprocess.run(
            command,
            env=environment,
            stdin=read_end,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise UntestableError(f"a fresh process gave no answer within {timeout_s:.0f} s") from None
    except OSError as error:
        raise UntestableError(f"a fresh process cannot be started: {error}") from None
    finally:
        os.close(read_end)
        os.close(write_end)
    if done.returncode != 0:
        last = next(iter(done.stderr.strip().splitlines()[-1:]), "it said nothing")
        ended = f"was killed by signal {-done.returncode}" if done.returncode < 0 else f"ended with {done.returncode}"
        raise UntestableError(f"a fresh process of stock transformers {ended}: {last}")
    return json.loads(done.stdout.strip().splitlines()[-1])
