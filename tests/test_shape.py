"""The shape of the code, counted over `src/excise`: how wide signatures and how long functions may get, and so on.

Counted with `ast` and `tokenize`: parameters of public functions and methods without self and cls; a function's lines
of code without its docstring, comments and blank lines; `Any` as a name in code; comments that have a line of their own
(not directives) as a share of all lines. Run this file to print the figures.
"""

import ast
import io
import json
import tokenize
from functools import cache
from pathlib import Path

SOURCE = Path(__file__).parents[1] / "src" / "excise"
MOST_PARAMETERS, MOST_LINES = 8, 80


@cache
def _trees():
    return {path: ast.parse(path.read_text()) for path in sorted(SOURCE.rglob("*.py"))}


def _functions():
    """(name, node) of every function."""
    for path, tree in _trees().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield f"{path.relative_to(SOURCE)}:{node.name}", node


def _parameters(node):
    named = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
    return len([name for name in named if name not in ("self", "cls")])


def wide():
    """Public functions with more than `MOST_PARAMETERS` parameters."""
    public = ((name, node) for name, node in _functions() if not node.name.startswith("_"))
    return {name: _parameters(node) for name, node in public if _parameters(node) > MOST_PARAMETERS}


def _tokens():
    for path in _trees():
        yield path, list(tokenize.generate_tokens(io.StringIO(path.read_text()).readline))


@cache
def lengths():
    """Function → lines of code."""
    skipped = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    code = {
        path: {line for t in tokens if t.type not in skipped for line in range(t.start[0], t.end[0] + 1)}
        for path, tokens in _tokens()
    }
    found = {}
    for path, tree in _trees().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                first = node.body[0]
                documented = ast.get_docstring(node, clean=False) is not None
                doc = set(range(first.lineno, (first.end_lineno or 0) + 1)) if documented else set()
                lines = code[path] & set(range(node.lineno, (node.end_lineno or 0) + 1)) - doc
                found[f"{path.relative_to(SOURCE)}:{node.name}"] = len(lines)
    return found


def per_thousand_any():
    """Uses of `Any` in code per 1,000 lines."""
    lines = sum(len(path.read_text().splitlines()) for path in _trees())
    uses = sum(isinstance(node, ast.Name) and node.id == "Any" for tree in _trees().values() for node in ast.walk(tree))
    return 1000 * uses / lines


def share_of_comments():
    """Lines that hold nothing but a comment (no directive), as a share of all lines."""
    lines = comments = 0
    for path, tokens in _tokens():
        lines += len(path.read_text().splitlines())
        own = (t for t in tokens if t.type == tokenize.COMMENT and not t.line[: t.start[1]].strip())
        comments += sum(not t.string.startswith(("# fmt", "# type", "# noqa", "# ruff")) for t in own)
    return comments / lines


def root_modules():
    """Modules beside the folders."""
    return sorted(path.name for path in SOURCE.glob("*.py"))


def test_signatures_stay_narrow():
    assert len(wide()) <= 5, wide()


def test_functions_stay_short():
    assert {name: lines for name, lines in lengths().items() if lines >= MOST_LINES} == {}


def test_types_say_what_they_are():
    assert per_thousand_any() < 8


def test_reasons_stand_beside_the_code():
    assert share_of_comments() >= 0.01


def test_the_root_stays_small():
    assert len(root_modules()) <= 13, root_modules()


if __name__ == "__main__":
    longest = max(lengths().items(), key=lambda item: item[1])
    figures = {
        "wide": wide(),
        "longest": longest,
        "any_per_1000_lines": round(per_thousand_any(), 2),
        "own_line_comments": round(share_of_comments(), 4),
        "root_modules": root_modules(),
    }
    print(json.dumps(figures, indent=1))
