"""What holds for every argument of every catalogue."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flagscale.runner.config.catalogue import BACKENDS, load_catalogue

ARGUMENTS = [(backend, name) for backend in BACKENDS for name in load_catalogue(backend).rows]
drawn_arguments = st.sampled_from(ARGUMENTS)
letters = st.characters(codec="ascii", categories=("Ll",))


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_argument_takes_its_own_default_choices_words_and_null(backend: str) -> None:
    catalogue = load_catalogue(backend)
    for name, argument in catalogue.arguments.items():
        for value in (argument.default, None, *argument.words):
            assert catalogue.check(name, value, name) is None, (name, value)
        for choice in argument.choices or ():
            wanted = [choice] * argument.nargs if isinstance(argument.nargs, int) else choice
            assert catalogue.check(name, wanted, name) is None, (name, choice)


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_argument_refuses_something(backend: str) -> None:
    catalogue = load_catalogue(backend)
    for name, argument in catalogue.arguments.items():
        refused = [value for value in ({1: 2}, True, False, "?!", 1.5, []) if argument.find_expected(value)]
        assert refused or argument.type == "any", name


@given(drawn_arguments)
def test_spelling_never_matters(drawn: tuple[str, str]) -> None:
    backend, name = drawn
    catalogue = load_catalogue(backend)
    argument = catalogue.find(name)
    assert argument is not None
    for spelling in (name.replace("_", "-"), *argument.flags):
        assert catalogue.find(spelling) == argument
        assert catalogue.find(spelling.lstrip("-").replace("-", "_")) == argument


@given(drawn_arguments)
def test_negative_flag_is_a_name_of_its_own(drawn: tuple[str, str]) -> None:
    backend, name = drawn
    catalogue = load_catalogue(backend)
    argument = catalogue.find(name)
    assert argument is not None
    if argument.negative_flag is None:
        assert argument.kind != "optional_bool"
        return
    negative = catalogue.find(argument.negative_flag)
    assert negative is not None
    assert (negative.kind, negative.flag) == ("store_false", argument.negative_flag)
    assert catalogue.check(negative.name, True, "p") is None


@settings(deadline=None)
@given(drawn_arguments, st.data())
def test_one_letter_typo_is_a_name_or_is_told_with_a_suggestion(drawn: tuple[str, str], data: st.DataObject) -> None:
    backend, name = drawn
    catalogue = load_catalogue(backend)
    at = data.draw(st.integers(0, len(name) - 1))
    letter = data.draw(letters)
    edits = (
        name[:at] + letter + name[at:],
        name[:at] + letter + name[at + 1 :],
        name[:at] + name[at + 1 :],
        name[:at] + name[at : at + 2][::-1] + name[at + 2 :],
    )
    typo = data.draw(st.sampled_from([edit for edit in edits if edit]))
    fault = catalogue.check(typo, None, f"train.{typo}")
    if catalogue.find(typo) is not None or catalogue.find_dropped(typo) is not None:
        assert fault is None
        return
    assert fault is not None
    assert fault.suggestion is not None
    assert catalogue.find(fault.suggestion) is not None


@given(drawn_arguments, st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(), st.lists(st.text())))
def test_check_never_raises_and_a_fault_says_what_was_expected(drawn: tuple[str, str], value: object) -> None:
    backend, name = drawn
    fault = load_catalogue(backend).check(name, value, f"a.{name}")
    assert fault is None or (fault.path == f"a.{name}" and fault.expected)


@given(drawn_arguments, st.integers())
def test_what_takes_a_float_takes_an_int_and_its_text(drawn: tuple[str, str], number: int) -> None:
    backend, name = drawn
    argument = load_catalogue(backend).find(name)
    assert argument is not None
    if argument.takes_value and argument.type in ("int", "float") and not argument.choices:
        count = argument.nargs if isinstance(argument.nargs, int) else 1
        wanted = [number] * count if argument.takes_list else number
        quoted = [str(number)] * count if argument.takes_list else str(number)
        assert argument.find_expected(wanted) is None
        assert argument.find_expected(quoted) is None
