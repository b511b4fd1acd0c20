"""The tests' catalogue has every optimizer, in every kind of test that runs over all of them."""

from catalogue import OVER_PROCESSES, VARIANTS, classes_of, one_of_each_state, public_optimizers


def with_keys_for(use):
    return [name for name, variant in VARIANTS.items() if getattr(variant, use) is not None]


def test_every_class_runs_over_processes_and_in_the_trainers_scripts():
    assert classes_of(OVER_PROCESSES) == public_optimizers()
    assert classes_of(with_keys_for("script")) == public_optimizers()


def test_every_class_without_layers_of_its_own_is_tried_on_matrices():
    layered = {variant.cls for variant in VARIANTS.values() if variant.layer}
    tried = classes_of(with_keys_for("quadratic"))
    assert tried >= public_optimizers() - layered
    assert tried <= public_optimizers()


def test_a_name_begins_with_that_of_its_class_and_one_stands_for_each_kind_of_state():
    assert all(name.split()[0] == variant.cls.__name__ for name, variant in VARIANTS.items())
    states = [VARIANTS[name].state for name in one_of_each_state(OVER_PROCESSES)]
    assert len(states) == len(set(states)) == len({VARIANTS[name].state for name in OVER_PROCESSES})
