"""Reading back what a figure file holds, after checking that it is whole in itself."""

import re
from pathlib import Path
from xml.etree import ElementTree

SVG = "{http://www.w3.org/2000/svg}"


class Figure:
    """A parsed figure file: XML, light on white, referring to nothing, its classes all styled."""

    def __init__(self, content):
        whole = content.read_bytes().decode() if isinstance(content, Path) else content
        self.root = ElementTree.fromstring(whole.encode())
        assert self.root.tag == f"{SVG}svg"
        # A namespace is a name, not an address to fetch.
        assert whole.count("://") == 1
        assert not re.search(r"url\(|@import|href|<script|<image|<foreignObject|var\(", whole)
        first = next(element for element in self.root if element.tag == f"{SVG}rect")
        size = [self.root.get("width"), self.root.get("height")]
        assert [first.get("width"), first.get("height"), first.get("fill")] == [*size, "#ffffff"]
        assert self.root.get("viewBox") == f"0 0 {' '.join(size)}"
        assert self.root.get("role") == "img"
        assert "sans-serif" in self.root.get("font-family")
        (style,) = self.root.iter(f"{SVG}style")
        styled = set(re.findall(r"^\.([\w-]+) \{", style.text, re.MULTILINE))
        used = {name for element in self.root.iter() for name in (element.get("class") or "").split()}
        # These two are what the page's script looks for; their colour is a class of its own.
        assert used - {"bar", "removed-mark"} <= styled

    @property
    def title(self):
        return self.root.find(f"{SVG}title").text

    @property
    def texts(self):
        return ["".join(element.itertext()) for element in self.root.iter(f"{SVG}text")]

    @property
    def tips(self):
        """What its marks say of their values."""
        return [tip for element in self.root.iter() if (tip := element.get("data-tip"))]

    def marked(self, style):
        """Elements of a class."""
        return [element for element in self.root.iter() if style in (element.get("class") or "").split()]

    def maps(self):
        """Heat maps in it: a list of {colour: cells as (row, first column, width)}."""
        found = []
        for group in self.root.iter(f"{SVG}g"):
            if group.get("shape-rendering") == "crispEdges":
                outlines = {path.get("fill"): re.findall(r"M(\d+) (\d+)h(\d+)v1", path.get("d")) for path in group}
                found.append({fill: [(int(i), int(j), int(w)) for j, i, w in d] for fill, d in outlines.items()})
        return found
