"""Which weights of a student learn."""

from __future__ import annotations

import pytest
import torch

from excise.errors import InputError
from excise.healing.settings import Settings
from excise.healing.student import trainable
from excise.models.stack import find_stack
from tests.tiny import MODEL_TYPES, tiny_model

REFITTED = Settings(train="refitted")
# Block 2 of seven was removed, so blocks 1 and 2 of those kept are next to the cut.
KEPT, TEACHER_BLOCKS, NEXT_TO_CUT = [0, 1, 3, 4, 5, 6], 7, (1, 2)


def learning(stack):
    trainable(stack, REFITTED, KEPT, TEACHER_BLOCKS)
    return {name for name, parameter in stack.model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_last_matrices_next_to_cuts_and_gains_of_norms_learn(model_type):
    stack = find_stack(tiny_model(model_type, 6))
    names = {module: name for name, module in stack.model.named_modules()}
    norms = {name for module, name in names.items() if type(module).__name__.lower().endswith(("norm", "normgated"))}
    inside = {place: f"{names[stack.blocks[place].module]}." for place in NEXT_TO_CUT}
    gains = {f"{name}.weight" for name in norms} & {name for name, _ in stack.model.named_parameters()}
    learned = learning(stack)
    assert gains <= learned
    rest = learned - gains
    for place in NEXT_TO_CUT:
        assert any(name.startswith(inside[place]) and stack.model.get_parameter(name).ndim > 1 for name in rest)
    assert all(name.startswith(tuple(inside.values())) for name in rest)
    # Of what has one dimension, nothing but gains and the biases of those matrices.
    matrices = {name.rpartition(".")[0] for name in rest if stack.model.get_parameter(name).ndim > 1}
    assert all(name.rpartition(".")[0] in matrices for name in rest)


def test_an_experts_matrix_learns_where_repair_scales_channels_and_a_shared_experts_alone_where_it_refits_that():
    names = {
        model_type: {n for n in learning(find_stack(tiny_model(model_type, 6))) if "norm" not in n}
        for model_type in ("gemma2", "mixtral", "glm4_moe", "mamba2", "nemotron_h")
    }
    assert names["gemma2"] == {f"model.layers.{i}.mlp.down_proj.weight" for i in NEXT_TO_CUT}
    assert names["mixtral"] == {f"model.layers.{i}.mlp.experts.down_proj" for i in NEXT_TO_CUT}
    dense, shared = (f"model.layers.{i}.mlp.{m}down_proj.weight" for i, m in ((1, ""), (2, "shared_experts.")))
    assert names["glm4_moe"] == {dense, shared}
    assert names["mamba2"] == {f"backbone.layers.{i}.mixer.out_proj.weight" for i in NEXT_TO_CUT}
    assert {n for n in names["nemotron_h"] if "layers.1." in n} == {
        "model.layers.1.mixer.shared_experts.down_proj.weight"
    }


def test_it_is_refused_where_no_matrix_would_learn():
    stack = find_stack(tiny_model("mamba2", 6))
    for place in NEXT_TO_CUT:
        stack.blocks[place].module.register_forward_hook(lambda module, args, output: torch.tanh(output))
    with pytest.raises(InputError, match=r"no block next to a cut has a matrix .* train 'cuts' or 'all'; block 1 of"):
        trainable(stack, REFITTED, KEPT, TEACHER_BLOCKS)
