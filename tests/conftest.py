"""What all tests share: the command line as a function, a cache of their own, one thread for torch, and no GPU.

The tiny models of the tests only lose by sharing their few operations out. Tests compare with what a CPU computes, to
the last bit at times; those of GPUs are in a folder of their own, and run where EXCISE_GPU is set (`make test-gpu`).
"""

import os
import sys

import pytest
import torch
from jaxtyping import install_import_hook

from . import shapes

if not os.environ.get("EXCISE_GPU"):
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

# Before anything of excise is imported.
install_import_hook(shapes.STAGES, f"{shapes.__name__}.checked")

from excise.__main__ import main  # noqa: E402
from excise.surgery import check, self_test  # noqa: E402

from .fresh import in_this_process  # noqa: E402

torch.set_num_threads(1)

LONGEST = (
    "test_run",
    "test_levels",
    "test_faults",
    "test_cli",
    "test_heal_stage",
    "test_heal",
    "test_search",
    "test_writer",
)


def pytest_collection_modifyitems(items):
    """The longest files first, so that no process is left with one at the end."""
    longest = {f"{name}.py": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: longest.get(item.path.name, len(longest)))


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """Hashes of files are kept apart from the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EXCISE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def quick_self_tests(request):
    """Self-tests run in this process, but for tests marked `fresh_process`, of what only a fresh one shows."""
    if request.node.get_closest_marker("fresh_process"):
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        for module in (check, self_test):
            patch.setattr(module, "in_fresh_process", in_this_process)
        yield


@pytest.fixture
def excise(monkeypatch, capsys):
    """Run `excise ARGUMENTS…`; returns exit status, standard output and standard error."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["excise", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            main()
        captured = capsys.readouterr()
        return stopped.value.code or 0, captured.out, captured.err

    return call
