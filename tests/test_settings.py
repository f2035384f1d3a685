"""Settings declared as fields: what is refused and how it is said, and the way to a recipe and back."""

from __future__ import annotations

import json
import math
import tracemalloc
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from excise.errors import InputError
from excise.settings import (
    MOST_UNITS,
    Checked,
    Option,
    amount,
    amount_of,
    borrowing,
    budgets,
    changed,
    check_fixed,
    declared,
    from_plain,
    indices,
    make,
    names,
    names_in,
    option,
    to_plain,
    values_of,
)


@dataclass(frozen=True, kw_only=True)
class Walk(Checked):
    goal: str = option(..., "Where to.", argument=True)
    steps: int = option(10, "How many.", least=1, most=99, group="Data")
    pace: float = option(1.5, "Metres per second.", above=0)
    share: float | None = option(None, "Of the way.", flag="--part", above=0, below=1)
    ground: str = option("road", "What on.", choices=("road", "sand"))
    solver: str = option("auto", "How.", choices=names_in("excise.ising.solvers:SOLVERS", "auto"))
    resting: bool = option(False, "Whether to rest.")
    log: Path | None = option(None, "Where it is written.")
    stops: tuple[int, ...] = option((), "Where to stop.", parse=indices)
    friends: tuple[str, ...] = option(("Ann",), "Who comes along; repeatable.")
    maps: tuple[Path, ...] = option((), "Maps; repeatable.")
    quiet: bool = option(False, "Say nothing.", recipe=False, group="Output")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"steps": 0}, "--steps expects a whole number, from 1 to 99, got 0"),
        ({"steps": 100}, "--steps expects a whole number, from 1 to 99, got 100"),
        ({"steps": 1.0}, "--steps expects a whole number, from 1 to 99, got 1.0"),
        ({"steps": True}, "--steps expects a whole number, from 1 to 99, got True"),
        ({"steps": None}, "--steps expects a whole number, from 1 to 99, got None"),
        ({"pace": 0}, "--pace expects a finite number, above 0, got 0"),
        ({"pace": math.nan}, "--pace expects a finite number, above 0, got nan"),
        ({"pace": math.inf}, "--pace expects a finite number, above 0, got inf"),
        ({"share": 1.0}, "--part (share) expects a finite number, above 0 and below 1, got 1.0"),
        ({"ground": "ice"}, "expected --ground in road, sand, got 'ice'"),
        ({"solver": "nonsense"}, "expected --solver in auto, branch-and-bound, exhaustive"),
        ({"resting": 1}, "--resting expects true or false, got 1"),
        ({"log": "here"}, "--log expects a path, got 'here'"),
        ({"stops": [1]}, "--stops expects a list, each a whole number, got [1]"),
        ({"stops": (1, "2")}, "--stops expects a list, each a whole number, got '2'"),
        ({"goal": None}, "GOAL expects text, got None"),
    ],
)
def test_bad_values_are_refused_when_settings_are_made(values, message):
    with pytest.raises(InputError) as refused:
        Walk(**{"goal": "home"} | values)
    assert str(refused.value).startswith(message)


def test_bounds_and_choices_themselves_are_allowed():
    walk = Walk(goal="home", steps=99, share=0.5, pace=1, ground="sand", solver="tabu", log=Path("x"), stops=(3, -1))
    assert (walk.steps, walk.solver, walk.stops) == (99, "tabu", (3, -1))


def test_what_a_recipe_holds_is_complete_and_comes_back():
    walk = Walk(goal="home", log=Path("a/b"), stops=(1, 2), maps=(Path("m"),), friends=("Bo", "Cy"), quiet=True)
    plain = to_plain(walk)
    assert plain == {
        "goal": "home", "pace": 1.5, "share": None, "ground": "road", "solver": "auto", "resting": False,
        "log": "a/b", "stops": [1, 2], "friends": ["Bo", "Cy"], "maps": ["m"], "steps": 10,
    }  # fmt: skip
    again = from_plain(Walk, json.loads(json.dumps(plain)))
    assert again == Walk(**{**vars(walk), "quiet": False})
    assert to_plain(again) == plain


@given(st.text(), st.floats(min_value=1e-300, allow_infinity=False), st.lists(st.integers(-9, 99)), st.lists(st.text()))
def test_any_settings_come_back_from_json(goal, pace, stops, friends):
    walk = Walk(goal=goal, pace=pace, stops=tuple(stops), friends=tuple(friends))
    assert from_plain(Walk, json.loads(json.dumps(to_plain(walk)))) == walk


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ({"frends": []}, "r.yaml: 'frends' is not a setting; did you mean 'friends'?"),
        ({"zzz": 3}, "r.yaml: 'zzz' is not a setting; known are goal, pace"),
        ({"quiet": True}, "r.yaml: 'quiet' is not a setting"),
        ({3: 3}, "r.yaml: '3' is not a setting"),
        ({"steps": "3"}, "r.yaml: --steps expects a whole number, from 1 to 99, got '3'"),
        ({"steps": 3.0}, "r.yaml: --steps expects"),
        ({"goal": 3}, "r.yaml: GOAL expects text, got 3"),
        ({"resting": "yes"}, "r.yaml: --resting expects true or false, got 'yes'"),
        ({"log": 3}, "r.yaml: --log expects a path, got 3"),
        ({"friends": "Ann"}, "r.yaml: --friends expects a list, each text, got 'Ann'"),
        ({"friends": [1]}, "r.yaml: --friends expects a list, each text, got 1"),
        ({"stops": "5-2"}, "r.yaml: --stops expects ranges from low to high"),
        ({"stops": {"a": 1}}, "r.yaml: --stops expects a list"),
        ({"pace": "quick"}, "r.yaml: --pace expects a finite number, above 0, got 'quick'"),
    ],
)
def test_what_is_wrong_in_a_recipe_is_told(recipe, message):
    with pytest.raises(InputError) as refused:
        values_of(Walk, recipe, "r.yaml")
    assert str(refused.value).startswith(message)


def test_a_recipe_may_write_lists_as_the_command_line_does():
    assert values_of(Walk, {"stops": "0-2,-1", "pace": 2}) == {"stops": (0, 1, 2, -1), "pace": 2.0}
    assert values_of(Walk, {"stops": 7})["stops"] == (7,)


def test_what_is_missing_is_named():
    with pytest.raises(InputError, match=r"GOAL is missing: Where to\."):
        make(Walk, {"steps": 3})


def test_a_field_is_taken_over_with_changes():
    @dataclass(frozen=True, kw_only=True)
    class Run(Walk):
        steps: int = changed(Walk, "steps", default=50, help="How many strides.")

    (steps,) = (setting for setting in declared(Run) if setting.name == "steps")
    assert steps.default == Run(goal="home").steps == 50
    assert steps.option == Option("How many strides.", group="Data", least=1, most=99)
    with pytest.raises(InputError, match="from 1 to 99"):
        Run(goal="home", steps=100)


def test_borrowed_fields_are_optional_and_keep_their_bounds():
    @dataclass(frozen=True, kw_only=True)
    @borrowing(Walk, group="Healing")
    class Changes(Checked):
        pace: float = option(3.0, "Own.")

    settings = {setting.name: setting for setting in declared(Changes)}
    assert settings["pace"].default == 3.0
    assert Changes() == Changes(steps=None)
    assert (settings["steps"].optional, settings["steps"].option.group) == (True, "Healing")
    with pytest.raises(InputError, match="--steps expects"):
        Changes(steps=0)


def test_order_is_by_group_then_required_first_then_the_command_lines_own_last():
    assert [setting.name for setting in declared(Walk)][:2] == ["goal", "pace"]
    assert [setting.name for setting in declared(Walk)][-2:] == ["steps", "quiet"]


def test_mistakes_of_a_declaration_are_found():
    @dataclass
    class Undeclared:
        steps: int = 3

    @dataclass
    class Strange:
        steps: complex = option(0j, "How many.")

    with pytest.raises(TypeError, match="not declared"):
        declared(Undeclared)
    with pytest.raises(TypeError, match="no option has the type"):
        declared(Strange)
    with pytest.raises(ValueError, match="expected a group"):
        option(1, "x", group="Dta")


def test_indices_read_lists_and_ranges():
    assert indices("0,3-5,-1", "--protect") == (0, 3, 4, 5, -1)
    assert indices("", "--protect") == ()
    assert indices(" 2 , 7-7", "--protect") == (2, 7)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1,x", "--protect expects indices such as 0,3-5,-1, got 'x'"),
        ("1.5", "--protect expects indices"),
        ("5-2", "--protect expects ranges from low to high such as 3-5, none beyond 100,000, got '5-2'"),
        ("0-99999999999", "none beyond 100,000"),
        ("99999999999", "none beyond 100,000"),
        ("-99999999999", "none beyond 100,000"),
    ],
)
def test_bad_indices_are_refused_and_allocate_nothing(text, message):
    tracemalloc.start()
    with pytest.raises(InputError) as refused:
        indices(text, "--protect")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert message in str(refused.value)
    assert peak < 8 * MOST_UNITS


def test_budgets_read_one_a_list_or_a_range():
    assert (budgets("8"), budgets("4,8,12"), budgets("3..5")) == ((8,), (4, 8, 12), (3, 4, 5))
    for text, message in (
        ("", "expects a number, a list 4,8,12 or a range 3..27, got ''"),
        ("4..2", "expects a range from low to high"),
        ("0", "numbers of at least 1"),
        ("3..99999999999", "none beyond 100,000"),
        ("2.5", "expects a number"),
    ):
        with pytest.raises(InputError, match=f"--remove {message}" if message.startswith("e") else message):
            budgets(text)


def test_names_are_separated_by_commas():
    assert names(" a, b,,c ", "--x") == ("a", "b", "c")


def test_what_no_removal_can_obey_is_refused():
    check_fixed((0, 1), (2, 2), 1)
    check_fixed((), (2, 3, 4))
    with pytest.raises(InputError, match="1, 2 cannot both stay and go"):
        check_fixed((2, 1, 0), (1, 2), 3)
    with pytest.raises(InputError, match="at most as many as --remove, 1, got 2: 3, 4"):
        check_fixed((), (3, 4), 1)


@dataclass(frozen=True, kw_only=True)
class Bake(Checked):
    loaves: int | None = option(None, "How many.", least=1, shares="flour")
    flour: str = option("", "How much.", parse=amount)


@pytest.mark.parametrize(
    ("given", "values"),
    [
        ({"loaves": "25%"}, {"flour": "25%"}),
        ({"loaves": 3}, {"loaves": 3}),
        ({"flour": 500}, {"flour": "500"}),
        ({"loaves": None, "flour": "0.5%"}, {"loaves": None, "flour": "0.5%"}),
    ],
)
def test_a_share_is_the_amount_of_another_setting(given, values):
    assert values_of(Bake, given) == values
    assert from_plain(Bake, to_plain(from_plain(Bake, given))) == Bake(**values)


def test_two_shares_are_one_too_many():
    with pytest.raises(InputError, match="--loaves 25% and flour: 10% ask for two shares; give one"):
        values_of(Bake, {"loaves": "25%", "flour": "10%"})


@pytest.mark.parametrize(("text", "value"), [("25%", 100.0), ("30", 30.0), (" 1.5e2", 150.0), ("0%", 0.0)])
def test_amounts_are_shares_or_numbers(text, value):
    assert amount(text, "--flour") == text
    assert amount_of(text, 400.0) == value


@pytest.mark.parametrize("text", ["%", "a lot", "nan", "inf%", "25 percent"])
def test_what_is_no_amount_is_refused(text):
    with pytest.raises(InputError, match="--flour expects a share such as 25%, or a number"):
        amount(text, "--flour")
