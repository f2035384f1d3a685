"""What a package index gets: an sdist in which the tests run, and a page whose links lead somewhere."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
REPOSITORY = "https://host.example/owner/excise"
# What a checkout has besides what belongs to it.
NOT_SOURCE = shutil.ignore_patterns(".*", "__pycache__", "*.pyc", "*.egg-info", "*.log", "build", "dist", "runs")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy, since building leaves files behind."""
    return shutil.copytree(ROOT, tmp_path_factory.mktemp("source") / "excise", ignore=NOT_SOURCE)


@pytest.fixture(scope="module")
def sdist(source):
    """Contents by name inside the archive's folder, built from a copy."""
    pytest.importorskip("setuptools", minversion="77", reason="setuptools builds the archive; pip install -e '.[dev]'")
    subprocess.run(
        [sys.executable, "-c", "from setuptools.build_meta import build_sdist; build_sdist('dist')"],
        cwd=source,
        env={**os.environ, "EXCISE_REPOSITORY": f"{REPOSITORY}/"},
        check=True,
        capture_output=True,
    )
    (path,) = (source / "dist").glob("*.tar.gz")
    with tarfile.open(path) as archive:
        files = [member for member in archive.getmembers() if member.isfile()]
        return {file.name.partition("/")[2]: archive.extractfile(file).read() for file in files}


def test_the_sdist_holds_everything_that_the_tests_read(source, sdist):
    folders = ("src/excise", "tests", "docs", "examples", "benchmarks", "recipes")
    paths = [path for folder in folders for path in (source / folder).rglob("*") if path.is_file()]
    wanted = {str(path.relative_to(source)) for path in paths}
    wanted |= {
        "Makefile",
        "constraints.txt",
        "pyproject.toml",
        "README.md",
        "CONTRIBUTING.md",
        "CHANGELOG.md",
        "LICENSE",
    }
    assert wanted <= {name for name in sdist if name != "PKG-INFO"}


def test_links_of_the_page_are_absolute_and_lead_to_files(source, sdist):
    _, _, page = sdist["PKG-INFO"].decode().partition("\n\n")
    links = re.findall(r"\]\(([^)]+)\)", page)
    assert len(links) == len(re.findall(r"\]\(([^)]+)\)", (source / "README.md").read_text()))
    for link in links:
        found = re.fullmatch(rf"{re.escape(REPOSITORY)}/(?:blob|raw)/main/([^#]+)(?:#.*)?", link)
        assert found, link
        assert (source / found[1]).is_file(), link


def test_the_metadata_say_where_the_method_is_described(sdist):
    assert b"Project-URL: Paper, https://arxiv.org/abs/2602.00161\n" in sdist["PKG-INFO"]
