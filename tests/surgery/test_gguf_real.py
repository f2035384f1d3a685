"""The real model's GGUF file pruned to 22 blocks, read by llama.cpp, beside the pruned safetensors model.

Needs llama.cpp's Python package, which compiles for minutes: `pip install llama-cpp-python`.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from benchmarks.weights import HOW_TO_INSTALL, smollm2
from transformers import AutoModelForCausalLM

from excise.models.loading import load
from excise.surgery.checkpoint import write_pruned
from excise.surgery.gguf import prune_gguf

REMOVED = [5, 10, 12, 13, 14, 16, 17, 18]
TEXT = (
    "The sea lay quiet under the morning sun. Fishermen pulled their boats onto the sand and counted what the night "
    "had given them. In the village above the harbour, the baker had already opened his door, and the smell of warm "
    "bread went down the narrow streets. Children ran to school with their books under their arms. Nobody knew yet "
    "that a letter had come, and that it would change the life of everyone who lived there."
)


def mean_nll(logits, ids):
    """Mean negative log-likelihood of each next token, in nats; logits [tokens, vocabulary]."""
    scores = torch.as_tensor(np.asarray(logits)).double().log_softmax(-1)
    return -scores[:-1].gather(1, torch.tensor(ids)[1:, None]).mean().item()


def llama_cpp_nll(path, ids):
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama.cpp is absent: pip install llama-cpp-python")
    model = llama_cpp.Llama(str(path), logits_all=True, n_ctx=256, n_threads=1, verbose=False)
    model.eval(ids)
    assert int(model.metadata["llama.block_count"]) == (30 if "out" not in path.name else 22)
    return mean_nll(model.scores[: len(ids)], ids)


@torch.no_grad()
def transformers_nll(model, ids):
    return mean_nll(model(torch.tensor([ids]), use_cache=False).logits[0].float().numpy(), ids)


@pytest.mark.slow
@pytest.mark.real
def test_llama_cpp_reads_the_pruned_file_as_transformers_reads_the_pruned_checkpoint(tmp_path):
    pytest.importorskip("llama_cpp", reason="llama.cpp is absent: pip install llama-cpp-python")
    if smollm2() is None:
        pytest.skip(f"no real weights; {HOW_TO_INSTALL}")
    original = load(str(smollm2()))
    ids = original.tokenizer(TEXT)["input_ids"]
    prune_gguf(smollm2(), REMOVED, tmp_path / "out.gguf")
    write_pruned(original.stack, REMOVED, tmp_path / "folder")
    pruned = AutoModelForCausalLM.from_pretrained(tmp_path / "folder", dtype=torch.float32)
    whole_there, whole_here = llama_cpp_nll(smollm2(), ids), transformers_nll(original.stack.model, ids)
    pruned_there, pruned_here = llama_cpp_nll(tmp_path / "out.gguf", ids), transformers_nll(pruned, ids)
    print(f"nats/token over {len(ids)} tokens: whole {whole_there:.4f} (llama.cpp) {whole_here:.4f} (transformers), ")
    print(f"pruned {pruned_there:.4f} (llama.cpp) {pruned_here:.4f} (transformers)")
    assert pruned_here - whole_here > 0.3
    # llama.cpp quantises activations to 8 bits in every matrix product; here they are float32.
    assert abs(whole_there - whole_here) < 0.05
    assert abs(pruned_there - pruned_here) < 0.05
