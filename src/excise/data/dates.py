"""The date of chat templates: with the day itself, the same samples would be others tomorrow."""

from __future__ import annotations

from datetime import date
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEMPLATE_DATE = date(2025, 1, 1)
DIRECTIVES = "aAbBcdDefFgGhHIjmMnpSuUVwWxXyYZ"


def asks_for_date(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a tokenizer's chat template writes today's date into every chat."""
    template = getattr(tokenizer, "chat_template", None)
    return "strftime_now" in str(template)


def dated_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """The chat template in which today is always `TEMPLATE_DATE`."""
    return _date_macro() + tokenizer.get_chat_template()


@cache
def _date_macro() -> str:
    """A macro in the place of transformers' function: what is passed to templates cannot be a function."""
    directives = [f"%{flag}{letter}" for letter in DIRECTIVES for flag in ("", "-")]
    replaced = [f"replace('{directive}', '{TEMPLATE_DATE.strftime(directive)}')" for directive in directives]
    # The line end is what Jinja drops after a block: the template itself begins a line, as before.
    return f"{{% macro strftime_now(format) %}}{{{{ format | {' | '.join(replaced)} }}}}{{% endmacro %}}\n"
