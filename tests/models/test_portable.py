"""For which readers a removal is right: every named case with its right value, from the table and on real folders."""

from __future__ import annotations

import itertools
import json

import pytest

from excise.errors import ArchitectureError, InputError
from excise.models.architectures import ARCHITECTURES
from excise.models.architectures.readers import READERS
from excise.models.portable import keeps_pattern, pattern_of, portability, require_portable, rules_of
from tests.readers_table import BEGIN, END, PAGE, readers_tables
from tests.tiny import tiny_config, tiny_folder

ALTERNATING = ["sliding_attention", "full_attention"] * 4
GEMMA3 = [*["sliding_attention"] * 5, "full_attention"] * 2
LINEAR = [*["linear_attention"] * 3, "full_attention"] * 2

# Model type, its config, removed blocks, readers that are wrong then (of those that know the model type).
CASES = {
    "gpt-oss, one block": ("gpt_oss", {"layer_types": ALTERNATING}, [3], {"vllm", "llama.cpp"}),
    "gpt-oss, two neighbours": ("gpt_oss", {"layer_types": ALTERNATING}, [3, 4], set()),
    "gpt-oss, two of one kind": ("gpt_oss", {"layer_types": ALTERNATING}, [1, 3], {"vllm", "llama.cpp"}),
    "gpt-oss, the last": ("gpt_oss", {"layer_types": ALTERNATING}, [7], set()),
    "gpt-oss, a run of four": ("gpt_oss", {"layer_types": ALTERNATING}, [2, 3, 4, 5], set()),
    "Gemma 2, one block": ("gemma2", {"layer_types": ALTERNATING}, [0], {"llama.cpp", "transformers-4.52"}),
    "Gemma 2, two neighbours": ("gemma2", {"layer_types": ALTERNATING}, [0, 1], set()),
    "Gemma 3, a sliding block": ("gemma3_text", {"layer_types": GEMMA3}, [2], {"llama.cpp", "transformers-4.52"}),
    "Gemma 3, a whole period, not in a row": ("gemma3_text", {"layer_types": GEMMA3}, [0, 2, 3, 5, 6, 9], set()),
    "Gemma 3, sliding blocks at the top": ("gemma3_text", {"layer_types": GEMMA3}, [10, 11], set()),
    "Gemma 3, six sliding blocks": (
        "gemma3_text", {"layer_types": GEMMA3}, [0, 1, 2, 6, 7, 8], {"llama.cpp", "transformers-4.52"},
    ),
    "Gemma 3, a period of three": (
        "gemma3_text",
        {"layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 3, "sliding_window_pattern": 3},
        [1, 2, 3],
        {"llama.cpp"},  # whose period is six whatever the config says
    ),
    "SmolLM3, a block with rotary embeddings": ("smollm3", {"no_rope_layer_interval": 4}, [1], {"llama.cpp"}),
    "SmolLM3, a period": ("smollm3", {"no_rope_layer_interval": 4}, [1, 2, 3, 4], set()),
    "SmolLM3, another interval than llama.cpp's": ("smollm3", {"no_rope_layer_interval": 3}, [], {"llama.cpp"}),
    "Qwen3-Next, a linear block": ("qwen3_next", {"layer_types": LINEAR}, [1], {"llama.cpp"}),
    "Qwen3-Next, a period": ("qwen3_next", {"layer_types": LINEAR}, [1, 2, 3, 4], set()),
    "Qwen3.5, a linear block": ("qwen3_5_text", {"layer_types": LINEAR}, [6], {"llama.cpp"}),
    "Llama, any": ("llama", {}, [1, 4], set()),
    "Qwen3 with windows at the top": ("qwen3", {}, [1, 4], set()),
    "Granite hybrid, whose list every reader reads": ("granitemoehybrid", {}, [0], set()),
    "Jamba, whose period is found anew": ("jamba", {}, [0, 1, 2], set()),
}  # fmt: skip


def config_of(case):
    model_type, options, *_ = CASES[case]
    return tiny_config(model_type, len(options.get("layer_types", range(8))), **options)


@pytest.mark.parametrize("case", CASES)
def test_readers(case):
    model_type, _, removed, wrong = CASES[case]
    config, record = config_of(case), ARCHITECTURES[model_type]
    found = portability(record, config, removed)
    assert set(found.wrong) == wrong
    assert {*found.right, *found.wrong, *found.without} == set(READERS)
    assert keeps_pattern(record, config, removed, found.right)
    require_portable(record, config, removed, found.right)
    for reader in wrong:
        assert not keeps_pattern(record, config, removed, [reader])
        with pytest.raises(ArchitectureError, match=f"{READERS[reader].title.split()[0]}.* --portable {reader}"):
            require_portable(record, config, removed, [reader])


@pytest.mark.parametrize("case", CASES)
def test_the_pattern_says_the_same_of_every_removal(case):
    config, record = config_of(case), ARCHITECTURES[CASES[case][0]]
    readers = [name for name in READERS if record.model_type not in READERS[name].without]
    pattern = pattern_of(record, config, readers)
    assert (pattern is None) == (not any(rules_of(record, config).values()))
    for count in (0, 1, 2, 4):
        for removed in itertools.combinations(range(config.num_hidden_layers), count):
            holds = pattern is None or pattern.holds(removed)
            assert holds == keeps_pattern(record, config, removed, readers)


def test_what_is_asked_for_is_known():
    with pytest.raises(InputError, match=r"expected readers in transformers, .*got 'ollama'"):
        pattern_of(ARCHITECTURES["gpt_oss"], tiny_config("gpt_oss"), ["vllm", "ollama"])
    with pytest.raises(ArchitectureError, match=r"transformers 4\.50 to 4\.52 does not know gpt_oss"):
        require_portable(ARCHITECTURES["gpt_oss"], tiny_config("gpt_oss"), [1], ["transformers-4.52"])


def test_a_period_that_transformers_drops_is_taken_from_the_file():
    config = tiny_config("qwen3_next", layer_types=["linear_attention", "linear_attention", "full_attention"] * 2)
    record, removed = ARCHITECTURES["qwen3_next"], [1, 2, 3]
    assert not keeps_pattern(record, config, removed, ["llama.cpp"])
    raw = {**config.to_dict(), "full_attention_interval": 3}
    assert keeps_pattern(record, config, removed, ["llama.cpp"], raw)
    assert not keeps_pattern(record, config, [0], ["llama.cpp"], raw)


def test_a_multimodal_model_is_read_by_its_text_config():
    config = tiny_config("gemma3", 6)
    raw = config.to_dict()
    raw["text_config"]["sliding_window_pattern"] = 3
    found = portability(ARCHITECTURES["gemma3"], config, [0], raw)
    assert set(found.wrong) == {"llama.cpp", "transformers-4.52"}
    assert (
        "one in 3: block 2, then 1, counts as sliding_attention and is full_attention"
        in found.wrong["transformers-4.52"]
    )


def test_placements_name_keys_that_the_config_has():
    for model_type, record in ARCHITECTURES.items():
        for placement in record.placements:
            values = getattr(tiny_config(model_type).get_text_config(decoder=True), placement.key)
            assert set(values) <= {placement.usual, placement.last}
            assert placement.reader in READERS
            assert model_type not in READERS[placement.reader].without
            assert placement.source


def test_the_page_has_the_table():
    """`python -m tests.readers_table` writes it."""
    assert PAGE.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0] == readers_tables()


@pytest.fixture(scope="module")
def gpt_oss(tmp_path_factory):
    return str(tiny_folder(tmp_path_factory.mktemp("model"), "gpt_oss"))


def test_prune_says_for_which_readers_the_result_is_right(gpt_oss, excise, tmp_path):
    code, out, err = excise("prune", gpt_oss, "--removed", "2", "--out", tmp_path / "one")
    assert code == 0, err
    flat = " ".join(out.split())
    assert "every block is taken for what it is by transformers 5, transformers 4.53 to 4.57" in flat
    assert "WRONG in vLLM" in flat
    assert "counts as sliding_attention and is full_attention" in flat
    recipe = json.loads((tmp_path / "one" / "excise.json").read_text())
    assert recipe["readers"]["right"] == ["transformers", "transformers-4.57"]
    assert set(recipe["readers"]["wrong"]) == {"vllm", "llama.cpp"}
    card = (tmp_path / "one" / "README.md").read_text()
    assert "| Kinds of blocks read rightly by | transformers 5, transformers 4.53 to 4.57 |" in card
    assert "| Kinds of blocks read WRONGLY by | vLLM" in card


@pytest.mark.parametrize("options", [(), ("--merge", "figure"), ("--removed-sublayers", "0.attention")])
def test_prune_refuses_what_a_reader_that_is_asked_for_would_read_wrongly(gpt_oss, excise, tmp_path, options):
    out = tmp_path / "out"
    if options[:1] != ("--merge",):  # of dense blocks only
        code, _, err = excise("prune", gpt_oss, "--removed", "2-3", *options, "--out", out, "--portable", "vllm")
        assert code == 0, err
        assert json.loads((out / "excise.json").read_text())["readers"]["wrong"] == {}
    code, _, err = excise("prune", gpt_oss, "--removed", "2", *options, "--out", tmp_path / "no", "--portable", "vllm")
    assert code == 2
    assert "vLLM" in err
    assert not (tmp_path / "no").exists()


def test_a_block_that_loses_all_its_sublayers_counts_as_removed(gpt_oss, excise, tmp_path):
    options = ("--removed-sublayers", "2.attention,2.moe", "--out", tmp_path / "no", "--portable", "llama.cpp")
    code, _, err = excise("prune", gpt_oss, *options)
    assert code == 2
    assert "llama.cpp" in err
    assert not (tmp_path / "no").exists()


def test_inspect_says_what_readers_take_from_the_index(gpt_oss, excise):
    code, out, _ = excise("inspect", gpt_oss)
    flat = " ".join(out.split())
    assert code == 0
    assert "every removal is right in transformers 5, transformers 4.53 to 4.57" in flat
    assert "only what keeps its pattern: layer_types is full_attention in one block in 2" in flat
    readers = json.loads(excise("inspect", gpt_oss, "--json")[1])["readers"]
    assert readers["transformers"] == []
    assert len(readers["vllm"]) == len(readers["llama.cpp"]) == 1


def test_the_choice_respects_what_readers_take_from_the_index(gpt_oss, excise, tmp_path):
    gradients = tmp_path / "g.safetensors"
    assert excise("score", gpt_oss, "--samples", 8, "--tokens", 16, "--out", gradients)[0] == 0
    options = ("--remove", 2, "--states", 50, "--json")
    free = json.loads(excise("solve", gradients, *options)[1])
    code, out, err = excise("solve", gradients, *options, "--portable", "vllm,llama.cpp")
    assert code == 0, err
    kept = json.loads(out)
    record, config = ARCHITECTURES["gpt_oss"], tiny_config("gpt_oss")
    right = [s for s in free["states"] if keeps_pattern(record, config, s["removed"], ["vllm", "llama.cpp"])]
    assert len(free["states"]) == 15
    assert kept["states"] == right
    assert len(right) == 5
    assert kept["certified"]
    assert kept["complete"]
    assert json.loads(excise("solve", gradients, *options, "--portable", "transformers")[1])["states"] == free["states"]


REFUSED = {
    "a reader that does not know the model": (("--portable", "transformers-4.52"), "does not know this model"),
    "no such reader": (("--portable", "ollama"), "expected --portable in"),
    "units that are no blocks": (("--portable", "vllm", "--granularity", "sublayer"), "leave out --granularity"),
    "nothing that keeps the pattern": (("--portable", "vllm", "--protect", "5", "--remove", "1"), "budget 1"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_choice_that_cannot_be_portable_is_refused(case, gpt_oss, excise, tmp_path):
    options, message = REFUSED[case]
    gradients = tmp_path / "g.safetensors"
    assert excise("score", gpt_oss, "--samples", 4, "--tokens", 12, "--out", gradients)[0] == 0
    remove = () if "--remove" in options else ("--remove", "2")
    code, _, err = excise("solve", gradients, *remove, *options)
    assert code == 2
    assert message in " ".join(err.split())
