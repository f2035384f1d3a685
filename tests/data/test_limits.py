import signal
from pathlib import Path

import pytest

from excise.data import limits
from excise.data.limits import limited
from excise.data.samples import Samples, load_samples
from excise.errors import InputError
from tests.tiny import tiny_tokenizer


def render(template: str) -> Samples:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return load_samples("starter", tokenizer, tokens=16)


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "may never end"),
        ("{% set x = 'a' %}{{ x * 10000000000 }}", "takes more than"),
        ("{{ 9 ** 9 ** 9 }}", "powers"),
        ("{% for i in range(3) %}{{ 'a' * 10000000 }}{% endfor %}", "30,000,000 characters"),
    ],
)
def test_a_template_is_a_program_that_must_end(template: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "SECONDS", 0.5)
    with pytest.raises(InputError, match=said):
        render(template)


def test_limits_are_gone_afterwards() -> None:
    import resource

    before = resource.getrlimit(resource.RLIMIT_AS), signal.getsignal(signal.SIGALRM)
    with limited("a test"):
        assert signal.getitimer(signal.ITIMER_REAL)[0] > 0
        if Path("/proc/self/statm").exists():
            assert resource.getrlimit(resource.RLIMIT_AS)[0] > 0
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
    assert (resource.getrlimit(resource.RLIMIT_AS), signal.getsignal(signal.SIGALRM)) == before
