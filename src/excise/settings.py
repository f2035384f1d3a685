"""Settings declared once: each field of a frozen dataclass carries its default, help, flag and bounds.

A verb of the command line takes one such dataclass, and its options, its checks and its recipes are made from the
fields. What several verbs share stands here as dataclasses to inherit from; `changed` takes over a field with another
default. Imports neither torch nor typer.

Examples:
    >>> from dataclasses import dataclass
    >>> @dataclass(frozen=True, kw_only=True)
    ... class Walk(Checked):
    ...     steps: int = option(..., "Steps to take.", least=1)
    ...     pace: float = option(1.5, "Metres per second.", above=0)
    >>> to_plain(Walk(steps=3))
    {'steps': 3, 'pace': 1.5}
    >>> from_plain(Walk, {"steps": 3, "paec": 1.0})
    Traceback (most recent call last):
    ...
    excise.errors.InputError: recipe: 'paec' is not a setting; did you mean 'pace'?

"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import math
import re
import types
from collections.abc import Callable, Iterable, Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, TypeVar, Union, get_args, get_origin, get_type_hints

from excise.errors import InputError
from excise.plain import Facts, Plain, Values

# In the order in which `--help` and recipes show them.
GROUPS = ("Arguments", "What to remove", "Options", "Data", "How it chooses", "Healing", "Machine", "Output")
# A file; a folder, or a .gguf file; a folder that is added to; a file that is brought up to date.
WRITES = ("file", "folder", "workspace", "update")
PLACEMENTS = ("auto", "resident", "streamed")
DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")
LOSS_ON = ("content", "all", "responses")
LOG_LEVELS = ("debug", "info", "warning", "error")
# Of what a request takes: reading its prompt and writing the answer, or one of the two.
LATENCIES = ("request", "prefill", "decode")
MILLISECONDS = "milliseconds"
ENGINES = ("transformers", "llama.cpp")

# More units than any matrix [units, units] that fits in memory has; a typing error must not allocate its range.
MOST_UNITS = 100_000
# Passes over the calibration samples. Four end in two draws of three on the removal that EvoPress found, two did not
# (log, 2026-11-24, refinement's default effort); up to sixteen nothing more is gained (log, 2026-11-24, what was left
# of selection).
DEFAULT_EFFORT = 8.0
# Of the calibration samples, for the closed-form repair; more than 6,144 were never compared with fewer (log,
# 2026-11-24, closed-form repair).
REPAIR_TOKENS = 16_384
# Beyond it NumPy's and transformers' generators refuse a seed.
MOST_SEED = 2**32 - 1

_KEY = "option"
_SIZE = re.compile(r"(\d+(?:\.\d+)?) ?([KMGTkmgt]i?B|B)")
_WORDS = {int: "a whole number", float: "a finite number", bool: "true or false", str: "text", Path: "a path"}

T = TypeVar("T")


@dataclass(frozen=True)
class Option:
    """What a field of a settings dataclass says besides its type and default; see `option` for the attributes."""

    help: str
    flags: tuple[str, ...] = ()
    group: str = "Options"
    least: float | None = None
    most: float | None = None
    above: float | None = None
    below: float | None = None
    choices: Sequence[str] | Callable[[], Iterable[str]] = ()
    parse: Callable[[str, str], Any] | None = None
    shares: str = ""
    shown: str | None = None
    hidden: bool = False
    argument: bool = False
    recipe: bool = True
    reads: str = ""
    writes: str = ""


def option(
    default: Any,
    help: str,
    *,
    flag: str | tuple[str, ...] = (),
    group: str = "Options",
    least: float | None = None,
    most: float | None = None,
    above: float | None = None,
    below: float | None = None,
    choices: Sequence[str] | Callable[[], Iterable[str]] = (),
    parse: Callable[[str, str], Any] | None = None,
    shares: str = "",
    shown: str | None = None,
    hidden: bool = False,
    argument: bool = False,
    recipe: bool = True,
    reads: str = "",
    writes: str = "",
) -> Any:
    """Declare a field of a settings dataclass.

    The field's type is `int`, `float`, `bool`, `str` or `Path`, one of them `| None`, or a `tuple[…, ...]` of one of
    them: an option that may be repeated, or, with `parse`, one text.

    Args:
        default: value where none is given; `...` where one must be.
        help: a sentence for `--help` and for recipes.
        flag: on the command line, aliases after the first; by default the name with dashes.
        group: heading under which `--help` shows it, of `GROUPS`.
        least: smallest value allowed.
        most: largest value allowed.
        above: bound that the value must exceed.
        below: bound that the value must stay under.
        choices: values allowed, or a function that imports them; it is called for other values than the default only.
        parse: makes the value from a text and the flag, or raises `InputError`.
        shares: name of the field that takes a text ending in %; empty where this one takes every text.
        shown: how `--help` writes the default, where it is not the value itself; empty to write none.
        hidden: accepted, but not shown by `--help`.
        argument: positional on the command line.
        recipe: whether it belongs into a recipe; not so what only says how the command line answers.
        reads: names something that is read: a "path", or a source of "data"; empty for neither.
        writes: names what is written, one of `WRITES`; empty where nothing is.

    """
    if group not in GROUPS:
        raise ValueError(f"expected a group in {GROUPS}, got {group!r}")
    if writes not in ("", *WRITES):
        raise ValueError(f"expected writes in {WRITES}, got {writes!r}")
    declared = Option(
        help=help,
        flags=(flag,) if isinstance(flag, str) else flag,
        group="Arguments" if argument else group,
        least=least,
        most=most,
        above=above,
        below=below,
        choices=choices,
        parse=parse,
        shares=shares,
        shown=shown,
        hidden=hidden,
        argument=argument,
        recipe=recipe,
        reads=reads,
        writes=writes,
    )
    return dataclasses.field(default=MISSING if default is ... else default, metadata={_KEY: declared})


def changed(owner: type, name: str, **changes: Any) -> Any:
    """A field as another settings dataclass declares it, but for `changes`: `default`, or any argument of `option`."""
    field = _fields(owner)[name]
    known = field.metadata[_KEY]
    arguments = {entry.name: getattr(known, entry.name) for entry in dataclasses.fields(Option)}
    arguments |= {"flag": arguments.pop("flags"), "default": ... if field.default is MISSING else field.default}
    return option(**arguments | changes)


def borrowing(owner: type, **changes: Any) -> Callable[[type[T]], type[T]]:
    """Add the fields of another settings dataclass to one, optional and None by default: what changes a preset.

    Fields that the decorated class declares itself stay as they are. Goes below `@dataclass`.
    """

    def add(cls: type[T]) -> type[T]:
        hints = get_type_hints(owner)
        for name in _fields(owner):
            if name not in cls.__annotations__:
                cls.__annotations__[name] = hints[name] | None
                setattr(cls, name, changed(owner, name, **{"default": None} | changes))
        return cls

    return add


def names_in(where: str, *others: str) -> Callable[[], tuple[str, ...]]:
    """Choices of an option that stand in a module, which is imported when one is checked: `--help` stays instant.

    Args:
        where: module:attribute of a tuple or a dict by name, such as "excise.ising.solvers:SOLVERS".
        others: choices besides these.

    """

    def look() -> tuple[str, ...]:
        module, attribute = where.split(":")
        return (*others, *getattr(importlib.import_module(module), attribute))

    return look


@dataclass(frozen=True)
class Setting:
    """A declared field: its option, with name, type and default.

    Attributes:
        name: of the field.
        kind: type of the value, or of each of its items.
        optional: None is allowed.
        many: the value is a tuple.
        default: MISSING where a value is required.
        option: the rest.

    """

    name: str
    kind: type
    optional: bool
    many: bool
    default: Any
    option: Option

    @property
    def flags(self) -> tuple[str, ...]:
        """Names on the command line: aliases after the first; an argument has none."""
        return () if self.option.argument else self.option.flags or (f"--{self.name.replace('_', '-')}",)

    @property
    def called(self) -> str:
        """What messages call it: its flag, with the field's name where that is another."""
        if self.option.argument:
            return self.name.upper()
        flag = self.flags[0]
        return flag if flag.removeprefix("--").replace("-", "_") == self.name else f"{flag} ({self.name})"

    @property
    def required(self) -> bool:
        """Whether it must be given."""
        return self.default is MISSING

    @property
    def bounds(self) -> str:
        """Allowed range in words; empty where there is none."""
        known = self.option
        if known.least is not None and known.most is not None:
            return f"from {known.least} to {known.most}"
        words = {"at least": known.least, "at most": known.most, "above": known.above, "below": known.below}
        return " and ".join(f"{word} {bound}" for word, bound in words.items() if bound is not None)

    def check(self, value: Plain) -> None:
        """Refuse a value of another type or out of range.

        Raises:
            InputError: names the flag, what was expected and what came.

        """
        if value is None and self.optional:
            return
        if self.many and not isinstance(value, tuple):
            raise self._refuses(value)
        for one in value if self.many else (value,):
            if not _is(one, self.kind) or not self._allows(one):
                raise self._refuses(one)
        # Defaults are known to be right; asking for the choices imports the modules that hold them.
        if self.option.choices and value != self.default:
            known = self.option.choices
            names = tuple(known() if callable(known) else known)
            for one in value if self.many else (value,):
                if one not in names:
                    raise InputError(f"expected {self.called} in {', '.join(names)}, got '{one}'")

    def of_text(self, given: Any) -> Any:
        """The value that the command line gives: a text, a list of them where the option repeats, or a bool.

        Raises:
            InputError: it is not such a value.

        """
        if self.option.parse is not None:
            return self.option.parse(given, self.called)
        return tuple(map(self._one_of_text, given)) if self.many else self._one_of_text(given)

    def of_plain(self, plain: Plain) -> Any:
        """The value that a recipe gives; a text stands for what the command line would make of it.

        Raises:
            InputError: another type.

        """
        if plain is None and self.optional:
            return None
        if self.option.parse is not None and isinstance(plain, str | int | float) and not isinstance(plain, bool):
            return self.of_text(str(plain))
        if self.many:
            if not isinstance(plain, list):
                raise self._refuses(plain)
            return tuple(map(self._one_of_plain, plain))
        return self._one_of_plain(plain)

    def _one_of_text(self, given: Any) -> Any:
        if self.kind is bool:
            return given
        try:
            return self.kind(given)
        except ValueError:
            raise self._refuses(given) from None

    def _one_of_plain(self, plain: Plain) -> Any:
        if not _is(plain, str if self.kind is Path else self.kind):
            raise self._refuses(plain)
        return self.kind(plain)

    def _allows(self, value: Plain) -> bool:
        if self.kind not in (int, float):
            return True
        known = self.option
        return (
            math.isfinite(value)
            and (known.least is None or value >= known.least)
            and (known.most is None or value <= known.most)
            and (known.above is None or value > known.above)
            and (known.below is None or value < known.below)
        )

    def _refuses(self, value: Plain) -> InputError:
        words = f"{'a list, each ' if self.many else ''}{_WORDS[self.kind]}"
        return InputError(f"{self.called} expects {', '.join(filter(None, (words, self.bounds)))}, got {value!r}")


def _is(value: Plain, kind: type) -> bool:
    if kind in (int, float):
        # true and false are integers to Python.
        return isinstance(value, int | float if kind is float else int) and not isinstance(value, bool)
    return isinstance(value, kind)


def _fields(cls: type) -> dict[str, dataclasses.Field[Any]]:
    return {field.name: field for field in dataclasses.fields(cls)}


def declared(cls: type) -> tuple[Setting, ...]:
    """The fields of a settings dataclass by group; in each, required ones come first, those of no recipe last.

    Raises:
        TypeError: a field was not declared with `option`, or its type is none that an option may have.

    """
    hints, settings = get_type_hints(cls), []
    for name, field in _fields(cls).items():
        if _KEY not in field.metadata:
            raise TypeError(f"{cls.__name__}.{name} is not declared with option(…)")
        kinds = get_args(hints[name]) if get_origin(hints[name]) in (Union, types.UnionType) else (hints[name],)
        kind, *others = (kind for kind in kinds if kind is not type(None))
        many = get_origin(kind) is tuple and get_args(kind)[1:] == (...,)
        kind = get_args(kind)[0] if many else kind
        if others or kind not in _WORDS:
            raise TypeError(f"{cls.__name__}.{name}: no option has the type {hints[name]}")
        settings.append(Setting(name, kind, len(kinds) > 1, many, field.default, field.metadata[_KEY]))
    return tuple(sorted(settings, key=_place))


def _place(setting: Setting) -> tuple[int, bool, bool]:
    return GROUPS.index(setting.option.group), not setting.required, not setting.option.recipe


def check(settings: Plain) -> None:
    """Refuse values of another type, out of range, or not among the choices; for `__post_init__`.

    Raises:
        InputError: names the flag, what was expected and what came.

    """
    for setting in declared(type(settings)):
        setting.check(getattr(settings, setting.name))


def make(cls: type[T], values: Values) -> T:
    """Settings from values by name of field.

    Raises:
        InputError: a required one is missing, or the class refuses one.

    """
    for setting in declared(cls):
        if setting.required and setting.name not in values:
            raise InputError(f"{setting.called} is missing: {setting.option.help}")
    return cls(**values)


def to_plain(settings: Plain) -> Facts:
    """What a recipe holds: every setting that belongs into one, as JSON and YAML write it; paths become texts."""
    return {
        setting.name: plain(getattr(settings, setting.name))
        for setting in declared(type(settings))
        if setting.option.recipe
    }


def plain(value: Plain) -> Any:
    """One value as JSON and YAML write it."""
    if isinstance(value, tuple):
        return [plain(one) for one in value]
    return str(value) if isinstance(value, Path) else value


def values_of(cls: type, recipe: Values, source: str = "recipe") -> Facts:
    """Values by name of field from what a recipe holds, which need not be all of them.

    Args:
        cls: the settings dataclass.
        recipe: what JSON or YAML gave.
        source: what messages call it.

    Raises:
        InputError: an unknown name (the nearest known one is named), or a value of another type.

    """
    known = {setting.name: setting for setting in declared(cls) if setting.option.recipe}
    for name in recipe:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"known are {', '.join(known)}"
            raise InputError(f"{source}: '{name}' is not a setting; {hint}")
    try:
        return {name: known[name].of_plain(value) for name, value in shares_apart(cls, recipe).items()}
    except InputError as error:
        raise InputError(f"{source}: {error}") from None


def shares_apart(cls: type, given: Values) -> Facts:
    """What was given by name of field, with texts such as 25% under the name of the field that takes shares.

    Raises:
        InputError: that one was given too.

    """
    values = dict(given)
    for setting in declared(cls):
        other, value = setting.option.shares, values.get(setting.name)
        if other and isinstance(value, str) and value.strip().endswith("%"):
            if values.get(other):
                raise InputError(f"{setting.called} {value} and {other}: {values[other]} ask for two shares; give one")
            del values[setting.name]
            values[other] = value
    return values


def from_plain(cls: type[T], recipe: Values, source: str = "recipe") -> T:
    """Settings from what a recipe holds; the inverse of `to_plain`.

    Raises:
        InputError: as for `values_of` and `make`.

    """
    return make(cls, values_of(cls, recipe, source))


def limits(text: str, called: str) -> tuple[str, ...]:
    """Read how much of each device may be taken.

    Args:
        text: GPUs' numbers or "cpu", each with a size after "=", separated by commas.
        called: what messages call the option.

    Raises:
        InputError: something else stands in it, or a device twice.

    Examples:
        >>> limits("cuda:0=20GiB, cpu=60GB", "--max-memory")
        ('0=20GiB', 'cpu=60GB')

    """
    found: dict[str, str] = {}
    for part in names(text, called):
        device, _, size = (piece.strip() for piece in part.partition("="))
        device = device.removeprefix("cuda:")
        if device in found or not (device == "cpu" or device.isdecimal()) or not _SIZE.fullmatch(size):
            raise InputError(f"{called} expects each device once, such as 0=20GiB,cpu=60GiB, got '{part}'")
        found[device] = size
    return tuple(f"{device}={size}" for device, size in found.items())


def bytes_of(size: str) -> int:
    """Bytes of a size such as 20GiB.

    Examples:
        >>> bytes_of("1.5GB"), bytes_of("2KiB")
        (1500000000, 2048)

    """
    number, unit = _SIZE.fullmatch(size).groups()  # type: ignore[union-attr]
    return int(float(number) * (1024 if "i" in unit else 1000) ** "BKMGT".index(unit[0].upper()))


def indices(text: str, called: str) -> tuple[int, ...]:
    """Read a list of integers and ranges.

    Args:
        text: integers from −`MOST_UNITS` to `MOST_UNITS` and ranges low-high, separated by commas.
        called: what messages call the option.

    Raises:
        InputError: something else stands in it.

    Examples:
        >>> indices("0,3-5,-1", "--protect")
        (0, 3, 4, 5, -1)

    """
    values: list[int] = []
    for part in names(text, called):
        low, dash, high = part.rpartition("-") if not part.startswith("-") else ("", "", part)
        try:
            first, last = int(low if dash else high), int(high)
        except ValueError:
            raise InputError(f"{called} expects indices such as 0,3-5,-1, got '{part}'") from None
        values += _range(first, last, f"{called} expects ranges from low to high such as 3-5", part)
    return tuple(values)


def budgets(text: str, called: str = "--remove") -> tuple[int, ...]:
    """Read numbers of units to remove: one, a list or a range.

    Raises:
        InputError: something else.

    Examples:
        >>> budgets("3..5"), budgets("4,8")
        ((3, 4, 5), (4, 8))

    """
    low, dots, high = text.partition("..")
    try:
        numbers = [int(low), int(high)] if dots else [int(part) for part in text.split(",")]
    except ValueError:
        raise InputError(f"{called} expects a number, a list 4,8,12 or a range 3..27, got '{text}'") from None
    if min(numbers) < 1:
        raise InputError(f"{called} expects numbers of at least 1, got '{text}'")
    if dots:
        return tuple(_range(numbers[0], numbers[1], f"{called} expects a range from low to high such as 3..27", text))
    return tuple(numbers)


def amount(text: str, called: str) -> str:
    """Check an amount to remove, which `amount_of` turns into a number; the text stays as it is, empty for none.

    Raises:
        InputError: it is neither a share such as 25% nor a number.

    """
    if text:
        amount_of(text, 1.0, called)
    return text


def amount_of(text: str, whole: float, called: str = "what is removed") -> float:
    """The amount that a text stands for.

    Args:
        text: a share such as 25%, or a number.
        whole: what it is a share of.
        called: what messages call the option.

    Raises:
        InputError: something else.

    Examples:
        >>> amount_of("25%", 400), amount_of("30", 400)
        (100.0, 30.0)

    """
    try:
        value = float(text.strip().removesuffix("%"))
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise InputError(f"{called} expects a share such as 25%, or a number, got '{text}'")
    return value / 100 * whole if text.strip().endswith("%") else value


def _range(low: int, high: int, expected: str, got: str) -> range:
    if high < low or max(abs(low), abs(high)) > MOST_UNITS:
        raise InputError(f"{expected}, none beyond {MOST_UNITS:,}, got '{got}'")
    return range(low, high + 1)


def names(text: str, called: str) -> tuple[str, ...]:
    """Read a list separated by commas; `called` is there for the signature of `option`'s `parse`."""
    return tuple(filter(None, (part.strip() for part in text.split(","))))


def require_one(remove: object, goals: Sequence[str]) -> None:
    """Refuse no budget, and two of them.

    Args:
        remove: numbers of units; empty or None where none are asked for.
        goals: amounts asked for instead, as the command line says them.

    Raises:
        InputError: there is not just one.

    """
    asked = [*([f"--remove {remove}"] if remove else []), *goals]
    if len(asked) != 1:
        raise InputError(
            "expected one of --remove (a number, or a share such as 25%), --remove-params, --remove-bytes, --speedup "
            f"and --remove-latency, got {' and '.join(asked) or 'none of them'}; leave the others out"
        )


def check_fixed(protected: Sequence[int], forced: Sequence[int], budget: int | None = None) -> None:
    """Refuse what no removal can obey.

    Args:
        protected: units that stay.
        forced: units that go.
        budget: how many go, if that is known.

    Raises:
        InputError: a unit is in both, or more are forced than may go.

    """
    both = sorted(set(protected) & set(forced))
    if both:
        raise InputError(
            f"{', '.join(map(str, both))} cannot both stay and go; leave it out of --protect or of --force-blocks"
        )
    if budget is not None and len(set(forced)) > budget:
        raise InputError(
            f"--force-blocks expects at most as many as --remove, {budget}, got {len(set(forced))}: "
            f"{', '.join(map(str, forced))}"
        )


@dataclass(frozen=True, kw_only=True)
class Checked:
    """Base of settings: refuses bad values when they are made.

    Attributes:
        divides: how a verb divides its work among several processes: not at all; its passes, with everything else done
            by all alike; or in its own way.

    """

    divides: ClassVar[Literal["no", "passes", "itself"]] = "no"

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True, kw_only=True)
class Placement(Checked):
    """Where a model is loaded."""

    device: str = option(
        "auto", "auto, cpu, cuda, cuda:1, …; auto spreads a large model over all GPUs.", group="Machine"
    )
    trust_remote_code: bool = option(False, "Run Python code that comes with the model.", group="Machine")


@dataclass(frozen=True, kw_only=True)
class Naming(Placement):
    """Which model, and in what precision it computes."""

    model: str = option(..., "A checkpoint folder, a .gguf file, or a hub id.", argument=True, reads="path")
    dtype: str = option(
        "auto",
        "auto, float32, bfloat16, float16 or float64: of the computation.",
        group="Machine",
        choices=DTYPES,
    )


@dataclass(frozen=True, kw_only=True)
class Loading(Naming):
    """Which model is loaded, and where its weights go."""

    placement: str = option(
        "auto",
        "resident: all weights in memory; streamed: a block at a time from the disk (docs/scale.md); auto: as it fits.",
        group="Machine",
        choices=PLACEMENTS,
    )
    max_memory: tuple[str, ...] = option(
        (),
        "Weights by device, such as 0=20GiB,cpu=60GiB; blocks beyond wait on the disk.",
        group="Machine",
        parse=limits,
    )
    device_map: Path | None = option(
        None, "JSON file: where each module's weights go, a GPU's number, cpu or disk.", group="Machine", reads="path"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        ways = {
            "--placement": self.placement != "auto",
            "--max-memory": self.max_memory,
            "--device-map": self.device_map,
        }
        if len(given := [flag for flag, value in ways.items() if value]) > 1:
            raise InputError(f"expected one of {', '.join(given)}: each says where the weights go")
        # Once more, for the lists of a recipe.
        limits(",".join(self.max_memory), "--max-memory")

    def loading(self) -> Facts:
        """Arguments of `excise.models.loading.load` besides the model."""
        by_device = {device: bytes_of(size) for device, size in (part.split("=") for part in self.max_memory)}
        return {
            "dtype": self.dtype,
            "device": self.device,
            "trust_remote_code": self.trust_remote_code,
            "placement": self.device_map or by_device or self.placement,
        }


@dataclass(frozen=True, kw_only=True)
class Batching(Checked):
    """How much of the data goes through a model at once."""

    batch_tokens: int | None = option(
        None,
        "Tokens that go through the model at once; by default what keeps it busy.",
        group="Machine",
        least=1,
    )


@dataclass(frozen=True, kw_only=True)
class BackwardPass(Batching):
    """How much memory a pass for gradients takes."""

    checkpointing: bool = option(
        False, "Recompute blocks in the backward pass: less memory, a third more time.", group="Machine"
    )


@dataclass(frozen=True, kw_only=True)
class Sampling(Checked):
    """Which samples are drawn."""

    data: str = option(
        "starter",
        "'starter' (shipped, offline), a file of chats or texts (JSON, CSV, Parquet, plain text; .gz), a folder, or a "
        "hub data set id such as teknium/OpenHermes-2.5 (add :configuration, and @split for a split other than train); "
        "several in given shares: a.jsonl:3,b.txt:1; 'self' or 'self=SOURCE': prompts of the starter or of a source, "
        "continued by the model itself, greedily; 'self@0.8' samples at that temperature.",
        group="Data",
        reads="data",
    )
    samples: int = option(128, "Calibration samples.", group="Data", least=1)
    tokens: int = option(512, "Longest sample in tokens; 0 for no limit.", group="Data", least=0)
    seed: int = option(0, "Seed of everything random.", group="Data", least=0, most=MOST_SEED)
    loss_on: str = option(
        # All tokens counted, a removal improves on the template's opening, the same in every chat (log, 2026-11-24,
        # what counts in a chat).
        "content",
        "Tokens that count: 'content' (all but what the chat template puts before a chat), 'all' (as in the paper) or "
        "'responses'.",
        group="Data",
        choices=LOSS_ON,
    )

    def drawing(self) -> Facts:
        """Arguments of `excise.data.load_samples` besides source and tokenizer."""
        return {name: getattr(self, name) for name in ("samples", "tokens", "seed", "loss_on")}


@dataclass(frozen=True, kw_only=True)
class Protecting(Checked):
    """Which blocks stay."""

    protect: tuple[int, ...] = option(
        (),
        "Blocks never removed, such as 0,1,-1 (negative ones count from the top).",
        group="What to remove",
        parse=indices,
    )


@dataclass(frozen=True, kw_only=True)
class Fixing(Protecting):
    """Which blocks stay and which go."""

    force_blocks: tuple[int, ...] = option(
        (), "Blocks always removed; they count towards --remove.", group="What to remove", parse=indices
    )


class Goal(NamedTuple):
    """An amount to remove.

    Attributes:
        asked: as the command line says it.
        measure: what is counted: parameters, bytes, milliseconds, …
        amount: as `amount_of` takes it.

    """

    asked: str
    measure: str
    amount: str


@dataclass(frozen=True, kw_only=True)
class Weighing(Checked):
    """How much is to be removed, by what it weighs: parameters, bytes, or the time that it takes."""

    remove_params: str = option(
        "",
        "Instead of M: at least these parameters, such as 25% (of those in blocks) or 30000000, and at most a unit "
        "more.",
        group="What to remove",
        parse=amount,
    )
    remove_bytes: str = option("", "Likewise in bytes.", group="What to remove", parse=amount)
    speedup: float | None = option(
        None,
        "Likewise in time: so much that a request is answered so many times as fast, such as 1.5 (docs/speed.md).",
        group="What to remove",
        above=1,
    )
    remove_latency: str = option(
        "",
        "Likewise: at least this time of a request, such as 30% or 120 (milliseconds).",
        group="What to remove",
        parse=amount,
    )
    latency_of: str = option(
        "request",
        "Which time counts: of the whole request, of its prefill, or of each token decoded after it.",
        group="What to remove",
        choices=LATENCIES,
    )
    times: Path | None = option(
        None, "Times of the blocks that `excise times` measured.", group="What to remove", reads="path"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.times is not None and not self.timed:
            raise InputError("--times says how long blocks take; it needs --speedup or --remove-latency")

    @property
    def timed(self) -> bool:
        """Whether time is what is removed."""
        return bool(self.speedup or self.remove_latency)

    def goals(self) -> list[Goal]:
        """What is asked for; no more than one can be met at once."""
        # What is s times as fast takes 1/s of the time.
        share = f"{100 * (1 - 1 / self.speedup)!r}%" if self.speedup else ""
        found = [
            Goal(f"--remove-params {self.remove_params}", "parameters", self.remove_params),
            Goal(f"--remove-bytes {self.remove_bytes}", "bytes", self.remove_bytes),
            Goal(f"--speedup {self.speedup}", MILLISECONDS, share),
            Goal(f"--remove-latency {self.remove_latency}", MILLISECONDS, self.remove_latency),
        ]
        return [goal for goal in found if goal.amount]


@dataclass(frozen=True, kw_only=True)
class Requesting(Checked):
    """The request whose time is measured."""

    prompt_tokens: int = option(512, "Tokens of the prompt whose time is measured.", group="Machine", least=1)
    new_tokens: int = option(64, "Tokens that are decoded after it.", group="Machine", least=2)
    engine: str = option(
        "transformers",
        "What is timed: transformers, or llama.cpp, which reads a .gguf file (needs xllamacpp).",
        group="Machine",
        choices=ENGINES,
    )


@dataclass(frozen=True, kw_only=True)
class Porting(Checked):
    """For which other programs the result must be right."""

    portable: tuple[str, ...] = option(
        (),
        "Programs besides transformers 5 for which the kinds of blocks must stay right: vllm, llama.cpp, "
        "transformers-4.57, transformers-4.52; several with commas.",
        group="What to remove",
        parse=names,
        choices=names_in("excise.models.architectures.readers:READERS"),
    )


@dataclass(frozen=True, kw_only=True)
class Printing(Checked):
    """How the command line answers."""

    as_json: bool = option(
        False,
        "Print JSON on standard output instead of a table.",
        flag="--json",
        group="Output",
        recipe=False,
    )
    quiet: bool = option(
        False,
        "Say nothing but results and errors: no progress, notes or warnings.",
        group="Output",
        recipe=False,
    )
    log_level: str = option(
        "warning",
        "What logs on standard error tell: debug, info (each stage with its seconds), warning or error.",
        group="Output",
        recipe=False,
        choices=LOG_LEVELS,
    )


@dataclass(frozen=True, kw_only=True)
class Replacing(Checked):
    """Whether results are replaced."""

    force: bool = option(
        False,
        "Make it again, and replace what is there already.",
        flag=("--force", "--overwrite"),
        group="Output",
        recipe=False,
    )


@dataclass(frozen=True, kw_only=True)
class Objecting(Checked):
    """Which damage refinement keeps low, and at what cost."""

    objective: str = option(
        # Transfers better than the loss, to text and to other chats (log, 2026-11-24, loss or divergence).
        "kl",
        "Damage to keep low: kl, loss, acceptance (of a draft by the original), choices (needs --questions), or a "
        "mixture: kl:0.7,choices:0.3.",
        group="How it chooses",
    )
    questions: Path | None = option(
        None,
        "Multiple-choice questions (JSONL) for the objective choices; a training split.",
        reads="path",
        group="How it chooses",
        hidden=True,
    )
    domains: str = option(
        "mean",
        "mean, or worst: the objective is that of the worst of the data's categories.",
        group="How it chooses",
        choices=names_in("excise.choosing.objectives:DOMAINS"),
        hidden=True,
    )
    repair: bool = option(
        True,
        "Choose by the damage that is left after closed-form repair, where that is exact.",
        group="How it chooses",
    )
    effort: float = option(
        DEFAULT_EFFORT,
        "What refinement may cost, in passes over the calibration samples.",
        group="How it chooses",
        least=0,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        asks = any(kind == "choices" for kind, _ in weighted_kinds(self.objective))
        if asks and self.questions is None:
            raise InputError("the objective 'choices' needs questions: pass --questions FILE (JSONL)")
        if self.questions is not None and not asks:
            raise InputError(
                f"--questions was given, but the objective '{self.objective}' has no choices; add it, or leave them out"
            )


OBJECTIVES = ("loss", "kl", "acceptance", "choices")


def weighted_kinds(objective: str) -> list[tuple[str, float]]:
    """Read an objective's text: kinds of damage, each with its weight.

    Raises:
        InputError: an unknown kind, or a weight that is no number above 0.

    Examples:
        >>> weighted_kinds("kl:0.7,choices:0.3")
        [('kl', 0.7), ('choices', 0.3)]

    """
    found = []
    for part in objective.split(","):
        kind, colon, weight_text = (piece.strip() for piece in part.partition(":"))
        if kind not in OBJECTIVES:
            raise InputError(
                f"expected an objective of {', '.join(OBJECTIVES)}, such as kl or kl:0.7,choices:0.3; got '{objective}'"
            )
        try:
            weight = float(weight_text) if colon else 1.0
        except ValueError:
            weight = 0.0
        if not (weight > 0 and math.isfinite(weight)):
            raise InputError(f"the weight of {kind} must be a number above 0, got '{weight_text}'")
        found.append((kind, weight))
    return found
