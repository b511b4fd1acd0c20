"""Every public class and function has an example in its docstring, and the examples give what they say."""

import contextlib
import doctest
import importlib
import inspect

import pytest
import torch

with contextlib.suppress(ImportError):
    import deepspeed  # noqa: F401  # writes a line where it is imported first: not into what an example prints

# Public modules; names where a module has no ``__all__`` and more in it than is public.
MODULES = {
    "gracile.optim": (),
    "gracile.models": (),
    "gracile.models.convert": ("convert", "merge"),
    "gracile.models.layers": (),
    "gracile.models.sparse_export": ("sparsify", "save", "load", "Exported"),
    "gracile.selections": (),
    "gracile.spectra": (),
    "gracile.train.watch": ("MemoryWatch", "MemoryCallback"),
    "gracile.train.spectra_callback": ("SpectraCallback",),
}

FLAGS = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS


def public_objects():
    """Classes and functions by their public name; what is imported into several modules counts once."""
    found, seen = {}, set()
    for module_name, names in MODULES.items():
        module = importlib.import_module(module_name)
        for name in getattr(module, "__all__", names):
            thing = getattr(module, name)
            if (inspect.isclass(thing) or inspect.isfunction(thing)) and id(thing) not in seen:
                seen.add(id(thing))
                found[f"{module_name}.{name}"] = thing
    return found


OBJECTS = public_objects()


def has_example(thing):
    return any(test.examples for test in examples_of(thing))


def examples_of(thing):
    """The docstring of a class or function, and those of a class's own public methods."""
    globs = {**vars(inspect.getmodule(thing)), "torch": torch}
    yield from doctest.DocTestFinder(recurse=False).find(thing, globs=globs)
    if inspect.isclass(thing):
        for name, member in vars(thing).items():
            member = getattr(member, "__func__", member)
            if not name.startswith("_") and inspect.isfunction(member):
                yield from doctest.DocTestFinder(recurse=False).find(member, f"{thing.__name__}.{name}", globs=globs)


@pytest.mark.parametrize("name", OBJECTS)
def test_the_examples_of_a_docstring_hold(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    failures = []
    runner = doctest.DocTestRunner(optionflags=FLAGS)
    for test in examples_of(OBJECTS[name]):
        runner.run(test, out=failures.append)
    assert runner.summarize(verbose=False).failed == 0, "".join(failures)


@pytest.mark.parametrize("name", OBJECTS)
def test_a_public_class_or_function_has_an_example(name):
    assert has_example(OBJECTS[name]), f"{name} has no example in its docstring (>>> ...)"


def test_this_test_sees_an_example_that_is_wrong():
    def wrong():
        """
        >>> 1 + 1
        3
        """

    runner = doctest.DocTestRunner(optionflags=FLAGS)
    for test in examples_of(wrong):
        runner.run(test, out=lambda text: None)
    assert runner.failures == 1
