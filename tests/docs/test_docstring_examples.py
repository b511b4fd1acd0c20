"""Every public class and function has an example in its docstring, and the examples give what they say."""

import doctest
import importlib
import inspect

import pytest
import torch

# Public modules; names where a module has no ``__all__`` and more in it than is public.
MODULES = {
    "gracile.optim": (),
    "gracile.models": (),
    "gracile.models.convert": ("convert", "merge"),
    "gracile.models.layers": (),
    "gracile.models.sparse_export": ("sparsify", "save", "load", "Exported"),
    "gracile.train.watch": ("MemoryWatch", "MemoryCallback"),
}

# Public names that have no example yet. The list only shrinks: a name that has one must leave it.
LACKING = {
    "gracile.models.build_llama",
    "gracile.models.convert.convert",
    "gracile.models.convert.merge",
    "gracile.models.layers.BlockSparseLinear",
    "gracile.models.layers.CSRLinear",
    "gracile.models.layers.CondensedLinear",
    "gracile.models.layers.DopedLinear",
    "gracile.models.layers.FactoredLinear",
    "gracile.models.layers.FactorisedLinear",
    "gracile.models.layers.InferenceLinear",
    "gracile.models.layers.IsoFlopLinear",
    "gracile.models.layers.LowRankLinear",
    "gracile.models.layers.NMLinear",
    "gracile.models.layers.OrderedLowRankLinear",
    "gracile.models.layers.ParallelLinear",
    "gracile.models.layers.ReLoRALinear",
    "gracile.models.layers.ScaledLinear",
    "gracile.models.layers.SemiStructuredLinear",
    "gracile.models.layers.SparseLowRankLinear",
    "gracile.models.layers.SpectralLinear",
    "gracile.models.layers.ThresholdLinear",
    "gracile.models.llama_config",
    "gracile.models.sparse_export.Exported",
    "gracile.models.sparse_export.load",
    "gracile.models.sparse_export.save",
    "gracile.models.sparse_export.sparsify",
    "gracile.optim.full_state",
    "gracile.optim.load_full_state",
    "gracile.optim.param_groups",
    "gracile.optim.state_bytes",
    "gracile.train.watch.MemoryCallback",
    "gracile.train.watch.MemoryWatch",
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
    told = []
    runner = doctest.DocTestRunner(optionflags=FLAGS)
    for test in examples_of(OBJECTS[name]):
        runner.run(test, out=told.append)
    assert runner.summarize(verbose=False).failed == 0, "".join(told)


@pytest.mark.parametrize("name", OBJECTS)
def test_a_public_class_or_function_has_an_example(name):
    if name in LACKING:
        assert not has_example(OBJECTS[name]), f"{name} has an example now: take it off the list LACKING"
    else:
        assert has_example(OBJECTS[name]), f"{name} has no example in its docstring (>>> ...)"


def test_the_list_of_what_lacks_one_names_public_things_only():
    assert not LACKING - OBJECTS.keys()


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
