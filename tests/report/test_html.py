"""Parts of the page: escaped, with numbers behind every figure."""

from markupsafe import Markup

from excise.drawing.axes import NARROW, WIDE
from excise.drawing.chart import Chart, Drawing, Entry
from excise.report.html import code, figure, table

HOSTILE = "<b onload='x'>\"&"
ESCAPED = "&lt;b onload=&#39;x&#39;&gt;&#34;&amp;"


def test_everything_from_data_is_escaped():
    chart = Chart(HOSTILE, lambda width: Drawing(9, []), (Entry(HOSTILE, "s0", 0),), HOSTILE, (HOSTILE,), ((HOSTILE,),))
    for made, times in ((table((HOSTILE,), [(HOSTILE,)], HOSTILE), 4), (code(HOSTILE), 1), (figure(chart), 8)):
        assert "<b" not in made
        assert made.count(ESCAPED) == times


def test_a_figure_is_drawn_for_wide_and_for_narrow_screens():
    chart = Chart("Damage", lambda width: Drawing(9, [Markup("<g id='{}'/>").format(width)]))
    made = figure(chart)
    assert f'<div class="wide"><svg viewBox="0 0 {WIDE} 9"' in made
    assert f'<div class="narrow"><svg viewBox="0 0 {NARROW} 9"' in made
    assert made.count("<g id=") == 2
    assert "<table>" not in made  # no numbers were given
    assert "legend" not in made
