"""What is timed is a prefill and a decode with a KV cache; the sizes are exact."""

import pytest
import torch

from excise.errors import InputError
from excise.evaluation.speed import machine, speed
from tests.tiny import tiny_model


def test_sizes_are_exact_and_speeds_are_medians():
    model = tiny_model("llama", layers=4)
    calls = []
    handle = model.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    found = speed(model, fingerprint="x", prompt_tokens=20, new_tokens=5)
    handle.remove()
    assert [tuple(shape) for shape in calls] == [(1, 20), *[(1, 1)] * 4] * 4  # a warm-up and three repeats
    weights = {t.data_ptr(): t for t in [*model.parameters(), *model.buffers()]}
    assert found.metrics["weight_bytes"].value == sum(t.numel() * t.element_size() for t in weights.values())
    # Keys and values of 2 heads of width 8 in float32, in each of 4 blocks.
    assert found.metrics["cache_bytes_per_token"].value == 4 * 2 * 2 * 8 * 4
    for name in ("prefill_tokens_per_second", "decode_tokens_per_second"):
        assert found.metrics[name].value == sorted(found.details[name])[1]
    assert found.settings["threads"] == torch.get_num_threads()


def test_a_short_model_gets_a_shorter_prompt():
    found = speed(tiny_model("llama", layers=1), fingerprint="x", prompt_tokens=500, new_tokens=4)
    assert found.details["prompt_tokens"] == 128 - 4


def test_lengths_that_measure_nothing_are_refused():
    with pytest.raises(InputError, match="new tokens"):
        speed(tiny_model("llama", layers=1), fingerprint="x", new_tokens=1)


def test_a_model_on_the_cpu_of_a_machine_with_a_gpu_is_not_told_as_on_the_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: f"GPU {device}")
    assert machine(torch.device("cpu"))["device"] == "cpu"
    assert machine(torch.device("cuda:1"))["device"] == "GPU cuda:1"
