"""Every public docstring says what each argument is, or by name where that is said, and what is raised."""

import importlib
import inspect
import re
from collections import Counter

import pytest
import torch

from tests.docs.test_docstring_examples import OBJECTS

SHORT = {name.rpartition(".")[2]: thing for name, thing in OBJECTS.items()}
CLASSES = {name: thing for name, thing in OBJECTS.items() if inspect.isclass(thing)}
OPTIMIZERS = [name for name, thing in CLASSES.items() if issubclass(thing, torch.optim.Optimizer)]
RAISING = {
    name: thing for name, thing in CLASSES.items() if not issubclass(thing, tuple)
}  # a named tuple refuses nothing
ENTRY = re.compile(
    r"^    (?P<names>[A-Za-z_]\w*(?:,\s+[A-Za-z_]\w*)*):\s+(?P<text>.*?)(?=^    \w|\Z)", re.MULTILINE | re.DOTALL
)
REFERENCE = re.compile(r"as for\s+``([\w.]+)``\.?")


def parameters(thing):
    """Names of the parameters of a function, or of a class's constructor."""
    made = thing.__init__ if inspect.isclass(thing) and not issubclass(thing, tuple) else thing
    return [name for name in inspect.signature(made).parameters if name != "self"]


def section(thing, title):
    """The indented lines below ``title:`` in a docstring."""
    found = re.search(rf"^{title}:\n((?:    .*\n|\n(?=    ))+)", inspect.getdoc(thing) + "\n", re.MULTILINE)
    return found[1] if found else ""


def described(thing):
    """What the section of arguments says of each, by name."""
    entries = {}
    for entry in ENTRY.finditer(section(thing, "Args")):
        for name in re.split(r",\s+", entry["names"]):
            assert name not in entries, f"{name} is described twice"
            entries[name] = entry["text"]
    return entries


def named(reference):
    """The class or function that a docstring refers to: a public one by its name, another by its full name."""
    if reference in SHORT:
        return SHORT[reference]
    module, _, name = reference.rpartition(".")
    return getattr(importlib.import_module(module), name)


@pytest.mark.parametrize("name", OBJECTS)
def test_every_argument_is_described(name):
    thing = OBJECTS[name]
    entries = described(thing)
    assert list(entries.keys() - parameters(thing)) == [], "described, but no argument"
    assert [parameter for parameter in parameters(thing) if parameter not in entries] == [], "not described"


@pytest.mark.parametrize("name", OBJECTS)
def test_where_an_argument_is_referred_to_it_is_described(name):
    thing = OBJECTS[name]
    for parameter, text in described(thing).items():
        found = REFERENCE.match(text)
        if not found:
            continue
        other = named(found[1])
        assert other is not thing
        assert parameter in parameters(other), f"{found[1]} has no argument {parameter}"
        if other in OBJECTS.values():
            there = described(other)
            assert parameter in there, f"{found[1]} does not describe {parameter}"
            onwards = REFERENCE.match(there[parameter])
            assert not onwards or onwards[1] not in SHORT, f"{found[1]} refers to another for {parameter}"


@pytest.mark.parametrize("name", OBJECTS)
def test_what_is_said_of_several_arguments_is_a_reference(name):
    """The documentation repeats it for each of them."""
    for text, count in Counter(described(OBJECTS[name]).values()).items():
        assert count <= 2 or REFERENCE.fullmatch(text.strip()), text


@pytest.mark.parametrize("name", RAISING)
def test_a_class_says_what_it_raises(name):
    errors = section(RAISING[name], "Raises")
    assert re.match(r"    [A-Z]\w+: \S", errors), f"{name} has no section Raises:"


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_says_what_its_state_is(name):
    assert re.search(r"^State(?: of an m x n [^:]+)?: ", inspect.getdoc(CLASSES[name]), re.MULTILINE)


@pytest.mark.parametrize("name", OBJECTS)
def test_a_docstring_begins_with_one_line(name):
    first = inspect.getdoc(OBJECTS[name]).split("\n\n")[0]
    assert "\n" not in first, "the first line is a paragraph of its own"
    assert first.endswith(".")


def test_this_test_sees_what_is_missing():
    def lacking(one, two, three):
        """Something.

        Args:
            one, two: as for ``gracile.optim.Lion``, which
                has neither.
        """

    assert described(lacking).keys() == {"one", "two"}
    assert REFERENCE.match(described(lacking)["one"])[1] == "gracile.optim.Lion"
    assert section(lacking, "Raises") == ""
