"""Maps of the stream against their formulas, channel by channel, and in a model."""

import math

import pytest
import torch
from benchmarks.patches import hadamard, linear_patch, patched, scalar, whole_stream

from excise.errors import InputError
from excise.models.stack import bypass, find_stack
from tests.random_samples import traces
from tests.tiny import tiny_model

WIDTH, TOKENS = 12, 40


@pytest.fixture
def streams():
    generator = torch.Generator().manual_seed(0)
    before = torch.randn(TOKENS, WIDTH, generator=generator, dtype=torch.float64)
    return before, before @ torch.randn(WIDTH, WIDTH, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("width", [1, 2, 4, 12, 24, 576, 768])
def test_a_hadamard_matrix_is_orthogonal_with_entries_of_one_size(width):
    matrix = hadamard(width)
    torch.testing.assert_close(matrix.T @ matrix, torch.eye(width, dtype=torch.float64))
    torch.testing.assert_close(matrix.abs(), torch.full((width, width), width**-0.5, dtype=torch.float64))


@pytest.mark.parametrize("width", [6, 10, 100])
def test_widths_without_one_here_are_refused(width):
    with pytest.raises(InputError, match=f"prime that is 3 modulo 4, got {width}"):
        hadamard(width)


def test_the_scalar_is_the_mean_ratio_of_magnitudes(streams):
    before, after = (stream.T.tolist() for stream in streams)
    ratios = [math.fsum(map(abs, y)) / math.fsum(map(abs, x)) for x, y in zip(before, after, strict=True)]
    expected = math.fsum(ratios) / WIDTH * torch.eye(WIDTH, dtype=torch.float64)
    torch.testing.assert_close(scalar(*streams), expected)


def test_linear_patch_makes_magnitudes_right_in_the_rotated_basis(streams):
    before, after = streams
    rotation = hadamard(WIDTH)
    got, wanted = ((stream @ rotation).abs().sum(dim=0) for stream in (before @ linear_patch(*streams), after))
    torch.testing.assert_close(got, wanted)


def test_the_whole_stream_is_mapped_where_a_map_explains_all(streams):
    before, after = streams
    torch.testing.assert_close(before @ whole_stream(before, after), after, rtol=1e-5, atol=1e-6)


def test_a_patched_model_goes_on_with_the_mapped_stream():
    stack = find_stack(tiny_model("llama", 6, dtype=torch.float64))
    ids, before = torch.arange(5)[None], traces(stack.model)
    width = stack.model.config.hidden_size
    eye, swap = (torch.eye(width, dtype=torch.float64) for _ in range(2))
    swap = swap.flip(0)
    with torch.no_grad():
        with bypass(stack, [1, 2, 4]):
            plain = stack.hidden(ids)
        with patched(stack, [1, 2, 4], {1: eye, 4: eye}):
            assert torch.equal(stack.hidden(ids), plain)
        # Two swaps in a row are none, wherever in the run they stand.
        with patched(stack, [1, 2, 4], {1: swap, 2: swap}):
            assert torch.equal(stack.hidden(ids), plain)
        with patched(stack, [1, 2, 4], {1: swap}):
            assert not torch.allclose(stack.hidden(ids), plain)
    assert traces(stack.model) == before
