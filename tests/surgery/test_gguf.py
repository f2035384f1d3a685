"""GGUF to GGUF: what stays is byte for byte the original's, loaders find it, and what cannot be right is refused."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch

from excise.errors import ArchitectureError, CheckpointError, InputError, OutputError
from excise.models.loading import load
from excise.models.stack import gated
from excise.surgery.gguf import prune_gguf
from tests.gguf_files import write_gguf
from tests.tiny import tiny_model, tiny_tokenizer

PROMPT = torch.tensor([[7, 81, 250, 33, 9, 120]])
REMOVED = [1, 4]


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


@pytest.fixture
def original(model, tmp_path):
    write_gguf(model, tmp_path / "original.gguf", quantised=gguf.GGMLQuantizationType.Q8_0)
    return tmp_path / "original.gguf"


def tensors_of(path):
    reader = gguf.GGUFReader(path)
    return {t.name: (t.tensor_type, t.shape.tolist(), t.data.tobytes()) for t in reader.tensors}


def metadata_of(path):
    fields = gguf.GGUFReader(path).fields.values()
    return {field.name: (field.types[:2], field.contents()) for field in fields if not field.name.startswith("GGUF.")}


def without_blocks(tensors, kept):
    """The tensors that are to stay, under the names that they are to have."""
    expected = {}
    for name, value in tensors.items():
        prefix, _, rest = name.partition(".")
        if prefix != "blk":
            expected[name] = value
        elif int(rest.split(".")[0]) in kept:
            index, _, rest = rest.partition(".")
            expected[f"blk.{kept.index(int(index))}.{rest}"] = value
    return expected


def test_what_stays_is_the_originals(original, tmp_path):
    recipe = prune_gguf(original, REMOVED, tmp_path / "out.gguf")
    assert tensors_of(tmp_path / "out.gguf") == without_blocks(tensors_of(original), [0, 2, 3, 5])
    before, after = metadata_of(original), metadata_of(tmp_path / "out.gguf")
    assert after.pop("llama.block_count")[1] == before.pop("llama.block_count")[1] - 2 == 4
    assert after.pop("excise.original")[1] == original.name
    assert after.pop("excise.removed")[1] == REMOVED
    assert after.pop("excise.original_blocks")[1] == recipe["original_blocks"] == [0, 2, 3, 5]
    assert after == before
    assert recipe["bytes"]["after"] == (tmp_path / "out.gguf").stat().st_size
    assert recipe["parameters"]["before"] - recipe["parameters"]["after"] == 2 * 9_280


def test_transformers_loads_it_and_it_equals_the_gated_original(original, tmp_path):
    prune_gguf(original, REMOVED, tmp_path / "out.gguf")
    whole, pruned = load(str(original)), load(str(tmp_path / "out.gguf"))
    alpha = torch.ones(6)
    alpha[REMOVED] = 0
    with torch.no_grad(), gated(whole.stack, alpha):
        expected = whole.stack.model(PROMPT, use_cache=False).logits
    with torch.no_grad():
        torch.testing.assert_close(pruned.stack.model(PROMPT, use_cache=False).logits, expected, rtol=0, atol=0)
    assert pruned.tokenizer("The fox")["input_ids"] == tiny_tokenizer()("The fox")["input_ids"]


@pytest.mark.parametrize("removed", [[0], [5], [-1, 0], [0, 1, 2, 3, 4], []])
def test_any_choice_of_blocks(removed, original, tmp_path):
    prune_gguf(original, removed, tmp_path / "out.gguf")
    kept = [i for i in range(6) if i not in {r % 6 for r in removed}]
    assert tensors_of(tmp_path / "out.gguf") == without_blocks(tensors_of(original), kept)


def test_lists_positions_and_blocks_above_the_stack(model, tmp_path):
    """One block for multi-token prediction above five; block 0 is dense, as block 1 that goes."""
    write_gguf(
        model,
        tmp_path / "a.gguf",
        nextn_predict_layers=1,
        leading_dense_block_count=2,
        attention__head_count_kv=[2, 3, 4, 5, 6, 7],
        rope__dimension_sections=[1, 2, 3, 4, 5],
    )
    prune_gguf(tmp_path / "a.gguf", [1, 3], tmp_path / "out.gguf")
    after = {key: value for key, (_, value) in metadata_of(tmp_path / "out.gguf").items()}
    assert after["llama.block_count"] == 4
    assert after["llama.leading_dense_block_count"] == 1
    assert after["llama.attention.head_count_kv"] == [2, 4, 6, 7]
    assert after["llama.rope.dimension_sections"] == [1, 2, 3, 4, 5]
    assert after["excise.original_blocks"] == [0, 2, 4]
    assert tensors_of(tmp_path / "out.gguf") == without_blocks(tensors_of(tmp_path / "a.gguf"), [0, 2, 4, 5])
    with pytest.raises(InputError, match="between 0 and 4"):
        prune_gguf(tmp_path / "a.gguf", [5], tmp_path / "out2.gguf")


def test_a_list_of_no_known_meaning_is_refused(model, tmp_path):
    write_gguf(model, tmp_path / "a.gguf", something=[1, 2, 3, 4, 5, 6])
    with pytest.raises(CheckpointError, match=r"llama\.something has as many entries"):
        prune_gguf(tmp_path / "a.gguf", [1], tmp_path / "out.gguf")


# What the file says of itself → what it must say without two of six blocks: 74,144 − 2 · 9,280 = 55,584 parameters.
NAMES = {
    "a name with its size": (
        {"name": "SmolLM2 135M Instruct", "size_label": "135M"},
        {"name": "SmolLM2 56K Instruct, 4 of 6 blocks", "size_label": "56K"},
    ),
    "a name with dashes": (
        {"name": "smollm2-135M-it", "size_label": "135M"},
        {"name": "smollm2-56K-it, 4 of 6 blocks", "size_label": "56K"},
    ),
    "a size inside a word is none": (
        {"name": "x135M", "size_label": "135M"},
        {"name": "x135M, 4 of 6 blocks", "size_label": "56K"},
    ),
    "a name alone": ({"name": "Mine 135M"}, {"name": "Mine 135M, 4 of 6 blocks", "size_label": None}),
    "a size alone": ({"size_label": "135M"}, {"name": None, "size_label": "56K"}),
    "neither": ({}, {"name": None, "size_label": None}),
}


@pytest.mark.parametrize("case", NAMES)
def test_name_and_size_are_those_of_what_is_left(case, model, tmp_path):
    general, expected = NAMES[case]
    write_gguf(model, tmp_path / "a.gguf", quantised=gguf.GGMLQuantizationType.Q8_0, general=general)
    prune_gguf(tmp_path / "a.gguf", REMOVED, tmp_path / "out.gguf")
    after = {key: value for key, (_, value) in metadata_of(tmp_path / "out.gguf").items()}
    assert {key: after.get(f"general.{key}") for key in expected} == expected
    prune_gguf(tmp_path / "a.gguf", [], tmp_path / "whole.gguf")
    whole = {key: value for key, (_, value) in metadata_of(tmp_path / "whole.gguf").items()}
    assert {key: whole.get(f"general.{key}") for key in general} == general


def test_the_size_of_experts_is_that_of_one_of_each(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "qwen3moe")
    writer.add_block_count(3)
    writer.add_size_label("8x99K")
    for block in range(3):
        writer.add_tensor(f"blk.{block}.attn_output.weight", np.zeros((100, 100), dtype=np.float32))
        writer.add_tensor(f"blk.{block}.ffn_up_exps.weight", np.zeros((8, 50, 100), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    prune_gguf(tmp_path / "a.gguf", [1], tmp_path / "out.gguf")
    assert metadata_of(tmp_path / "out.gguf")["general.size_label"][1] == "8x30K"


@pytest.mark.parametrize(
    ("metadata", "removed", "message"),
    [
        ({"attention__shared_kv_layers": 2}, [1], "share key/value caches"),
        ({"attention__sliding_window_pattern": 3}, [1], "would take block 2 wrongly"),
        ({"attention__sliding_window_pattern": 3}, [0, 1, 2], None),
        ({"full_attention_interval": 2}, [1, 2], None),
        ({"full_attention_interval": 2}, [2], "one block in 2"),
        ({"interleave_moe_layer_step": 1}, [2], None),
    ],
)
def test_what_llama_cpp_derives_from_the_index_is_minded(metadata, removed, message, model, tmp_path):
    write_gguf(model, tmp_path / "a.gguf", **metadata)
    if message is None:
        prune_gguf(tmp_path / "a.gguf", removed, tmp_path / "out.gguf")
        return
    with pytest.raises(ArchitectureError, match=message):
        prune_gguf(tmp_path / "a.gguf", removed, tmp_path / "out.gguf")
    assert not (tmp_path / "out.gguf").exists()


def empty_file(path, architecture, **numbers):
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in numbers.items():
        writer.add_uint32(key.replace("__", "."), value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()


@pytest.mark.parametrize(
    ("architecture", "numbers", "error", "message"),
    [
        ("nonesuch", {"nonesuch__block_count": 4}, ArchitectureError, "not known to excise"),
        ("gemma2", {"gemma2__block_count": 4}, ArchitectureError, "one block in 2 of gemma2"),
        (
            "olmo2",
            {"olmo2__block_count": 4, "olmo2__attention__sliding_window": 8},
            ArchitectureError,
            "one block in 4",
        ),
        ("olmo2", {"olmo2__block_count": 4}, CheckpointError, "lacks tensors of block 0"),
        ("llama", {}, CheckpointError, "no sound llama.block_count"),
        ("llama", {"llama__block_count": 1, "llama__nextn_predict_layers": 1}, CheckpointError, "no sound"),
        ("llama", {"llama__block_count": 4, "split__count": 3}, CheckpointError, "one of 3 parts"),
    ],
)
def test_files_that_cannot_be_pruned_rightly_are_refused(architecture, numbers, error, message, tmp_path):
    empty_file(tmp_path / "a.gguf", architecture, **numbers)
    with pytest.raises(error, match=message):
        prune_gguf(tmp_path / "a.gguf", [1], tmp_path / "out.gguf")


def test_blocks_beyond_the_count_are_refused(model, tmp_path):
    write_gguf(model, tmp_path / "a.gguf")
    reader = gguf.GGUFReader(tmp_path / "a.gguf", "r+")
    reader.fields["llama.block_count"].parts[-1][0] = 5
    reader.data.flush()
    with pytest.raises(CheckpointError, match="has tensors of block 5"):
        prune_gguf(tmp_path / "a.gguf", [1], tmp_path / "out.gguf")


def test_damaged_files_are_refused_and_nothing_written(original, tmp_path):
    content = original.read_bytes()
    (tmp_path / "in").mkdir()
    huge = content[:8] + (2**62).to_bytes(8, "little") + content[16:]
    for damaged in (content[: len(content) // 2], content[:100], b"no gguf at all" * 100, b"GGUF", huge):
        (tmp_path / "in" / "x.gguf").write_bytes(damaged)
        with pytest.raises(CheckpointError, match="truncated or"):
            prune_gguf(tmp_path / "in" / "x.gguf", [1], tmp_path / "place" / "out.gguf")
    assert not (tmp_path / "place").exists()


def test_destinations(original, tmp_path):
    prune_gguf(original, [1], tmp_path / "out.gguf")
    with pytest.raises(OutputError, match="--force"):
        prune_gguf(original, [2], tmp_path / "out.gguf")
    prune_gguf(original, [2], tmp_path / "out.gguf", overwrite=True)
    assert metadata_of(tmp_path / "out.gguf")["excise.removed"][1] == [2]
    with pytest.raises(OutputError, match="is what is being read"):
        prune_gguf(original, [2], original, overwrite=True)
    (tmp_path / "folder").mkdir()
    with pytest.raises(OutputError, match="is a folder"):
        prune_gguf(original, [2], tmp_path / "folder", overwrite=True)
    with pytest.raises(InputError, match="no GGUF file"):
        prune_gguf(tmp_path / "absent.gguf", [2], tmp_path / "b.gguf")


def test_alignment_is_kept(tmp_path):
    model = tiny_model("llama", 2)
    write_gguf(model, tmp_path / "a.gguf", alignment=64)
    prune_gguf(tmp_path / "a.gguf", [0], tmp_path / "out.gguf")
    reader = gguf.GGUFReader(tmp_path / "out.gguf")
    assert reader.alignment == 64
    assert all(tensor.data_offset % 64 == 0 for tensor in reader.tensors)
    assert tensors_of(tmp_path / "out.gguf") == without_blocks(tensors_of(tmp_path / "a.gguf"), [1])
