"""Pruned in memory and on disk = the original with gates at 0, for every architecture."""

from __future__ import annotations

import json
import resource
import signal

import pytest
import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer

from excise.errors import ArchitectureError, CheckpointError, InputError, OutputError
from excise.models.stack import bypass, find_stack, gated
from excise.surgery.checkpoint import pruned, write_pruned
from tests.tiny import EAGER_EXPERTS, MODEL_TYPES, removable_pair, tiny_config, tiny_folder, tiny_model, tiny_tokenizer

REMOVED = [1, 4]  # where no architecture forbids it
PROMPT = torch.tensor([[7, 81, 250, 33, 9, 120, 64, 200, 15, 41], [90, 12, 12, 77, 280, 6, 31, 199, 55, 100]])


@torch.no_grad()
def logits_of(model, ids=PROMPT):
    return model(input_ids=ids, use_cache=False).logits


def gated_logits(stack, removed):
    alpha = torch.ones(len(stack.blocks), dtype=torch.float64)
    alpha[removed] = 0
    with gated(stack, alpha):
        return logits_of(stack.model)


@torch.no_grad()
def greedy(model, ids, tokens=8):
    """Greedy continuation by whole forward passes, without the end-of-text token, as `min_new_tokens` has it."""
    for _ in range(tokens):
        logits = logits_of(model, ids)[:, -1:]
        logits[..., model.generation_config.eos_token_id] = -torch.inf
        ids = torch.cat([ids, logits.argmax(-1)], dim=1)
    return ids


def greedy_with_cache(model, ids, tokens=8):
    attention_mask = torch.ones_like(ids)
    return model.generate(
        ids,
        attention_mask=attention_mask,
        do_sample=False,
        use_cache=True,
        min_new_tokens=tokens,
        max_new_tokens=tokens,
    )


def reload(folder, dtype=torch.float64):
    options = EAGER_EXPERTS if dtype == torch.float64 else {}
    model, loading = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True, **options)
    assert not any(loading.values()), loading
    return model


def stored_dtypes(folder):
    dtypes = set()
    for shard in folder.glob("*.safetensors"):
        with safe_open(shard, framework="pt") as file:
            dtypes |= {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
    return dtypes


def snapshot(model):
    """Everything that surgery may touch, as plain values."""
    indices = {
        (name, key): value
        for name, module in model.named_modules()
        for key, value in vars(module).items()
        if isinstance(value, int | str)
    }
    return indices, model.config.to_dict(), {name: id(p) for name, p in model.named_parameters()}


@pytest.fixture(
    scope="module",
    params=[("llama", False), *((model_type, True) for model_type in MODEL_TYPES)],  # tests/test_architectures: untied
    ids=lambda p: f"{p[0]}-tied" if p[1] else p[0],
)
def stack(request):
    model_type, tied = request.param
    return find_stack(tiny_model(model_type, dtype=torch.float64, tied=tied))


@pytest.fixture
def removed(stack):
    return removable_pair(stack.architecture.model_type)


def test_bypass_equals_gates_at_zero(stack, removed):
    expected = gated_logits(stack, removed)
    with bypass(stack, removed):
        assert (logits_of(stack.model) - expected).abs().max() < 1e-9
    assert (logits_of(stack.model) - expected).abs().max() > 0.1, (
        "removal changes nothing: the test would prove nothing"
    )


def test_pruned_in_memory_equals_gates_at_zero_and_all_is_put_back(stack, removed):
    expected, before, whole = gated_logits(stack, removed), snapshot(stack.model), logits_of(stack.model)
    with pruned(stack, removed) as model:
        assert (logits_of(model) - expected).abs().max() < 1e-9
        blocks = model.get_submodule(stack.architecture.stack)
        own_indices = {m.layer_idx for m in blocks.modules() if hasattr(m, "layer_idx")}
        assert own_indices <= set(range(4)), "a module still knows its old index"
        assert torch.equal(greedy_with_cache(model, PROMPT), greedy(model, PROMPT))
    assert snapshot(stack.model) == before
    assert torch.equal(logits_of(stack.model), whole)


def test_checkpoint_loads_in_stock_transformers_and_equals_gates_at_zero(stack, removed, tmp_path):
    expected, before = gated_logits(stack, removed), snapshot(stack.model)
    recipe = write_pruned(stack, removed, tmp_path / "out")
    assert snapshot(stack.model) == before
    model = reload(tmp_path / "out")
    assert (logits_of(model) - expected).abs().max() < 1e-9
    assert torch.equal(greedy_with_cache(model, PROMPT), greedy(model, PROMPT))
    tied = stack.model.get_input_embeddings().weight is stack.model.get_output_embeddings().weight
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) == tied
    assert recipe["parameters"] == {
        "before": sum(p.numel() for p in stack.model.parameters()),
        "after": sum(p.numel() for p in model.parameters()),
    }


def test_all_is_put_back_after_an_error():
    stack = find_stack(tiny_model("smollm3"))
    before = snapshot(stack.model)
    with pytest.raises(ZeroDivisionError), pruned(stack, [0, 3]):
        raise ZeroDivisionError
    assert snapshot(stack.model) == before


@pytest.mark.parametrize(
    "removed",
    [[0], [5], [0, 1, 2], [-1, 2], [0, 1, 2, 3, 4], []],
    ids=["first", "last", "run", "negative", "5 of 6", "none"],
)
def test_any_choice_of_blocks(removed, tmp_path):
    stack = find_stack(tiny_model("qwen3", dtype=torch.float64))
    write_pruned(stack, removed, tmp_path / "out")
    difference = logits_of(reload(tmp_path / "out")) - gated_logits(stack, [i % 6 for i in removed])
    assert difference.abs().max() < 1e-9


@pytest.mark.parametrize("removed", [list(range(6)), [6], [2, 2], [2, -4]])
def test_impossible_choices_are_refused(removed, tmp_path):
    with pytest.raises(InputError):
        write_pruned(find_stack(tiny_model("llama")), removed, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_folder_is_complete(tmp_path):
    stack, tokenizer = find_stack(tiny_model("llama")), tiny_tokenizer()
    stack.model.generation_config.temperature, stack.model.generation_config.do_sample = 0.6, True
    write_pruned(stack, REMOVED, tmp_path / "out", tokenizer=tokenizer, card={"seed": 5, "original": "org/base"})
    reloaded = AutoTokenizer.from_pretrained(tmp_path / "out")
    chat = [{"role": "user", "content": "Grüß Gott"}]
    assert reloaded.apply_chat_template(chat, tokenize=False) == tokenizer.apply_chat_template(chat, tokenize=False)
    assert reloaded("Grüß Gott")["input_ids"] == tokenizer("Grüß Gott")["input_ids"]
    assert reload(tmp_path / "out").generation_config.temperature == 0.6
    recipe = json.loads((tmp_path / "out" / "excise.json").read_text())
    assert recipe["original_blocks"] == [0, 2, 3, 5]
    assert (recipe["removed"], recipe["seed"], recipe["original"], recipe["dtype"]) == (
        REMOVED,
        5,
        "org/base",
        "float32",
    )
    assert "base_model: org/base" in (tmp_path / "out" / "README.md").read_text()
    assert not list(tmp_path.glob(".*")), "a temporary folder was left"


def test_shards(tmp_path):
    stack = find_stack(tiny_model("llama", dtype=torch.float64))
    write_pruned(stack, REMOVED, tmp_path / "out", max_shard_size=200_000)
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1
    assert (logits_of(reload(tmp_path / "out")) - gated_logits(stack, REMOVED)).abs().max() < 1e-9


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "mixtral"])
def test_stored_dtype_without_loss(model_type, tmp_path):
    """A bfloat16 checkpoint computed in float32: stored as bfloat16, the same bits."""
    tiny_folder(tmp_path / "original", model_type, dtype=torch.bfloat16, tied=True)
    original = AutoModelForCausalLM.from_pretrained(tmp_path / "original", dtype=torch.float32)
    stack, before = find_stack(original), {k: v.clone() for k, v in original.state_dict().items()}
    recipe = write_pruned(stack, REMOVED, tmp_path / "out", dtype=torch.bfloat16)
    assert recipe["dtype"] == "bfloat16"
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert stored_dtypes(tmp_path / "out") == {"BF16"}
    assert torch.equal(logits_of(reload(tmp_path / "out", torch.float32)), gated_logits(stack, REMOVED))
    after = original.state_dict()
    assert all(after[k].dtype == v.dtype and torch.equal(after[k], v) for k, v in before.items())
    assert original.get_input_embeddings().weight is original.get_output_embeddings().weight


def test_stored_dtype_that_rounds_leaves_the_model_unrounded(tmp_path):
    stack = find_stack(tiny_model("llama"))
    before = {k: v.clone() for k, v in stack.model.state_dict().items()}
    write_pruned(stack, REMOVED, tmp_path / "out", dtype=torch.float16)
    assert all(torch.equal(v, before[k]) for k, v in stack.model.state_dict().items())
    kept = reload(tmp_path / "out", torch.float16).model.layers[1].mlp.up_proj.weight
    assert torch.equal(kept, before["model.layers.2.mlp.up_proj.weight"].half())


def test_parameters_that_transformers_keeps_in_float32_stay_so(tmp_path):
    stack = find_stack(tiny_model("llama"))
    stack.model._keep_in_fp32_modules_strict = {"input_layernorm"}
    write_pruned(stack, REMOVED, tmp_path / "out", dtype=torch.bfloat16)
    assert stored_dtypes(tmp_path / "out") == {"BF16", "F32"}


def test_a_dtype_that_overflows_is_refused(tmp_path):
    stack = find_stack(tiny_model("llama"))
    with torch.no_grad():
        stack.model.model.layers[0].mlp.up_proj.weight[0, 0] = 1e6
    with pytest.raises(CheckpointError, match="exceeds the range"):
        write_pruned(stack, REMOVED, tmp_path / "out", dtype=torch.float16)
    assert list(tmp_path.iterdir()) == []
    assert {p.dtype for p in stack.model.parameters()} == {torch.float32}


def test_an_existing_folder_is_refused_unless_forced(tmp_path):
    stack, out = find_stack(tiny_model("llama")), tmp_path / "out"
    write_pruned(stack, [0], out)
    with pytest.raises(OutputError, match="--force"):
        write_pruned(stack, [1], out)
    assert json.loads((out / "excise.json").read_text())["removed"] == [0]
    write_pruned(stack, [1], out, overwrite=True)
    assert json.loads((out / "excise.json").read_text())["removed"] == [1]


def test_a_folder_that_is_no_checkpoint_is_never_replaced(tmp_path):
    out = tmp_path / "thesis"
    out.mkdir()
    (out / "chapter.txt").write_text("years of work")
    with pytest.raises(OutputError, match="not written by excise"):
        write_pruned(find_stack(tiny_model("llama")), [0], out, overwrite=True)
    assert (out / "chapter.txt").read_text() == "years of work"


def test_the_original_is_never_replaced(tmp_path):
    folder = tiny_folder(tmp_path / "original", "llama")
    stack = find_stack(AutoModelForCausalLM.from_pretrained(folder))
    with pytest.raises(OutputError, match="being read"):
        write_pruned(stack, [0], folder, overwrite=True)
    assert reload(folder, torch.float32).config.num_hidden_layers == 6


def test_failure_midway_leaves_nothing(tmp_path):
    class FailingTokenizer:
        def save_pretrained(self, folder):
            assert (folder / "config.json").exists()
            raise RuntimeError("midway")

    stack = find_stack(tiny_model("llama"))
    before = snapshot(stack.model)
    with pytest.raises(RuntimeError, match="midway"):
        write_pruned(stack, [0], tmp_path / "out", tokenizer=FailingTokenizer())
    assert list(tmp_path.iterdir()) == []
    assert snapshot(stack.model) == before


def test_a_file_that_cannot_grow_is_an_output_error(tmp_path):
    """As a full disk is: the system refuses bytes in the midst of writing the weights."""
    stack = find_stack(tiny_model("llama"))
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
        with pytest.raises(OutputError, match="nothing was left"):
            write_pruned(stack, [0], tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [("I/O error: No space left on device (os error 28)", OutputError), ("InvalidHeader", SafetensorError)],
)
def test_only_lack_of_space_is_translated(text, expected, tmp_path):
    class FullDisk:
        def save_pretrained(self, folder):
            raise SafetensorError(text)

    with pytest.raises(expected):
        write_pruned(find_stack(tiny_model("llama")), [0], tmp_path / "out", tokenizer=FullDisk())


def test_a_model_from_gguf_is_written_plain_and_keeps_its_marks(tmp_path):
    class Quantizer:
        packed_modules = None
        quantization_config = None

        def is_serializable(self):
            return False

    stack = find_stack(tiny_model("llama", dtype=torch.float64))
    stack.model.config.quantization_config = {"quant_method": "gguf"}
    stack.model.hf_quantizer, stack.model.quantization_method = Quantizer(), "gguf"
    write_pruned(stack, REMOVED, tmp_path / "out")
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert (logits_of(reload(tmp_path / "out")) - gated_logits(stack, REMOVED)).abs().max() < 1e-9
    assert stack.model.config.quantization_config == {"quant_method": "gguf"}
    assert (type(stack.model.hf_quantizer), stack.model.quantization_method) == (Quantizer, "gguf")
    stack.model.hf_quantizer.packed_modules = {"model.layers.0.mlp.up_proj.weight": None}
    with pytest.raises(CheckpointError, match="packed"):
        write_pruned(stack, REMOVED, tmp_path / "packed")


def test_other_quantisations_are_refused(tmp_path):
    stack = find_stack(tiny_model("llama"))
    stack.model.config.quantization_config = {"quant_method": "bitsandbytes"}
    with pytest.raises(CheckpointError, match="bitsandbytes"):
        write_pruned(stack, [0], tmp_path / "out")


def test_attention_scaled_by_depth_is_refused():
    with pytest.raises(ArchitectureError, match="scale_attn_by_inverse_layer_idx"):
        find_stack(tiny_model("gpt2", scale_attn_by_inverse_layer_idx=True))


def test_an_offloaded_model_is_written(tmp_path):
    folder = tiny_folder(tmp_path / "original", "llama")
    device_map = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    device_map |= {f"model.layers.{i}": "disk" if i in (2, 4) else "cpu" for i in range(6)}
    offload = {"device_map": device_map, "offload_folder": tmp_path / "offload"}
    stack = find_stack(AutoModelForCausalLM.from_pretrained(folder, **offload))
    with pytest.warns(UserWarning, match="offloaded"):
        write_pruned(stack, [1, 4], tmp_path / "out")
    assert torch.allclose(logits_of(reload(tmp_path / "out", torch.float32)), gated_logits(stack, [1, 4]), atol=1e-5)
    with pytest.raises(CheckpointError, match="offloaded"):
        write_pruned(stack, [1, 4], tmp_path / "cast", dtype=torch.bfloat16)


def test_a_multimodal_class_keeps_its_other_towers(tmp_path):
    """Qwen 3.5 with its vision tower, which AutoModelForCausalLM would leave out."""
    torch.manual_seed(0)
    config = tiny_config("qwen3_5")
    original = AutoModelForImageTextToText.from_config(config, dtype=torch.float64).eval()
    stack = find_stack(original)
    assert stack.architecture.stack == "model.language_model.layers"
    expected = gated_logits(stack, REMOVED)
    write_pruned(stack, REMOVED, tmp_path / "out")
    for loader in (AutoModelForImageTextToText, AutoModelForCausalLM):
        model, loading = loader.from_pretrained(tmp_path / "out", dtype=torch.float64, output_loading_info=True)
        assert not any(loading.values()), loading
        assert (logits_of(model) - expected).abs().max() < 1e-9
