"""Training loss by step."""

import itertools
import math
import os
import subprocess
import sys

import pytest

from excise.drawing.chart import svg_file
from excise.drawing.loss_curves import loss_curves, running_mean
from tests.svg_files import Figure


def curve(losses):
    return [{"step": k + 1, "loss": loss} for k, loss in enumerate(losses)]


def test_a_curve_is_a_running_mean_of_few_points():
    losses = [float(k % 7) for k in range(1000)]
    points = running_mean(curve(losses))
    assert len(points) == 200
    assert points[0] == (50, pytest.approx(sum(losses[:50]) / 50))
    assert points[-1] == (1000, pytest.approx(sum(losses[-50:]) / 50))


def test_losses_that_are_not_finite_are_left_out():
    assert running_mean(curve([1.0, math.nan, 3.0, math.inf])) == [(1, 1.0), (3, 3.0)]
    assert running_mean([{"step": 1}]) == []
    assert loss_curves({"healed": curve([math.nan])}) is None
    assert loss_curves({}) is None


def test_one_curve_lies_over_its_single_steps():
    chart = loss_curves({"healed": curve([2.0, 1.0, 0.5, 0.25])}, "Held out: 3.")
    figure = Figure(svg_file(chart))
    faint, means = (figure.marked(style)[0].get("points") for style in ("faint", "curve"))
    assert faint == means  # four steps: windows of one
    pairs = [tuple(map(float, pair.split(","))) for pair in means.split()]
    across, down = zip(*pairs, strict=True)
    assert [b - a for a, b in itertools.pairwise(across)] == pytest.approx([across[1] - across[0]] * 3, abs=0.11)
    # Pixels fall as losses do.
    assert [(y - down[0]) / (down[3] - down[0]) for y in down] == pytest.approx([0, 1 / 1.75, 1.5 / 1.75, 1], abs=0.01)
    assert "Held out: 3." in figure.texts[-1]
    assert chart.rows == (("healed", "1", "2"), ("healed", "2", "1"), ("healed", "3", "0.5"), ("healed", "4", "0.25"))


def test_several_curves_are_told_apart_by_name_and_colour():
    figure = Figure(svg_file(loss_curves({"lora": curve([2.0, 1.0]), "all": curve([3.0, 1.0])})))
    assert not figure.marked("faint")
    assert [element.get("class") for element in figure.marked("curve")] == ["curve stroke-s0", "curve stroke-s1"]
    assert [element.text for element in figure.marked("name")] == ["lora", "all"]
    assert figure.title == "Distillation loss by step, 2 curves"


def test_every_process_writes_the_same_bytes():
    code = (
        "import sys\nfrom excise.drawing.chart import svg_file\nfrom excise.drawing.loss_curves import loss_curves\n"
        "curves = {name: [{'step': k, 'loss': 1 / (k + 1)} for k in range(50)] for name in ('a', 'b', 'c')}\n"
        "sys.stdout.buffer.write(svg_file(loss_curves(curves)).encode())"
    )
    written = {
        subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, check=True
        ).stdout
        for seed in ("1", "2")
    }
    assert len(written) == 1
    assert len(written.pop()) > 3000
