"""The examples of docs/bridges.md run as they stand."""

import importlib.util
import re
from pathlib import Path

DOCUMENT = Path(__file__).parents[3] / "docs" / "bridges.md"


def test_the_examples_run():
    names: dict = {}
    blocks = re.findall(
        r"(<!-- needs (\w+) -->\n)?```python\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL
    )
    assert len(blocks) == 4
    for _, package, code in blocks:
        if not package or importlib.util.find_spec(package):
            exec(compile(code, str(DOCUMENT), "exec"), names)
