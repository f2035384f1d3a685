"""The page of a package index: the README, its links made absolute to wherever the source is published.

EXCISE_REPOSITORY names that place when a release is built (`make dist REPOSITORY=…`); without it they stay as they are.
"""

import os
import re
from pathlib import Path

from setuptools import setup

LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!\w+:|#)([^)]+)\)")


def absolute(text: str, repository: str) -> str:
    """Markdown with links to pages, and images as they are, of the main branch of a repository."""
    kinds = {"!": "raw", "": "blob"}
    return LINK.sub(lambda m: f"{m[1]}[{m[2]}]({repository}/{kinds[m[1]]}/main/{m[3]})", text)


if __name__ == "__main__":
    readme = Path(__file__).with_name("README.md").read_text(encoding="utf-8")
    repository = os.environ.get("EXCISE_REPOSITORY", "").rstrip("/")
    setup(
        long_description=absolute(readme, repository) if repository else readme,
        long_description_content_type="text/markdown",
    )
