"""Matrices as colours: every cell once, in the colour of its value."""

import numpy as np
import pytest

from excise.drawing.chart import Chart, Drawing, svg_file
from excise.drawing.heat_map import LEVELS, STOPS, colour, heat_map
from tests.svg_files import Figure


def read_back(cells, limit, shape):
    """The matrix that a map shows, to within half a step of its scale."""
    levels = {colour(k / (LEVELS - 1)): k for k in range(LEVELS)}
    assert len(levels) == LEVELS
    matrix = np.full(shape, np.nan)
    for fill, runs in cells.items():
        for row, column, width in runs:
            assert np.isnan(matrix[row, column : column + width]).all()
            matrix[row, column : column + width] = limit * (2 * levels[fill] / (LEVELS - 1) - 1)
    assert not np.isnan(matrix).any()
    return matrix


@pytest.mark.parametrize("shape", [(1, 1), (7, 7), (3, 20)])
def test_the_matrix_can_be_read_back(shape):
    matrix = np.random.default_rng(0).normal(size=shape)
    drawn = heat_map(matrix, 2.0, 100, 50)
    (cells,) = Figure(svg_file(Chart("map", lambda width: Drawing(50, [drawn])))).maps()
    found = read_back(cells, 2.0, shape)
    np.testing.assert_allclose(found, np.clip(matrix, -2, 2), atol=2 / (LEVELS - 1) + 1e-9)


def test_equal_neighbours_are_one_cell_and_the_size_is_as_asked():
    drawn = heat_map(np.full((4, 8), -1.0), 1.0, 80, 20)
    assert drawn == (
        '<g transform="scale(10 5)" shape-rendering="crispEdges"><path fill="#053061" d="'
        'M0 0h8v1h-8zM0 1h8v1h-8zM0 2h8v1h-8zM0 3h8v1h-8z"/></g>'
    )


def test_the_scales_ends_are_its_first_and_last_stop_and_nothing_is_in_the_middle():
    assert [colour(share) for share in (0, 0.5, 1)] == [STOPS[0], STOPS[4], STOPS[8]]
    assert STOPS[4] in heat_map([[0.0]], 3.0, 1, 1)
