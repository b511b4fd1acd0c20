"""A range of a tensor as rows: what each process sees of the rows, and that nothing is lost on the way back."""

import itertools

import pytest
import torch

from gracile.optim.distributed import RowView, ShardRange, complete_rows
from gracile.optim.distributed.process_group import FakeGroup

WIDTH, ROWS = 5, 7
BOUNDS = {
    "between rows": (0, 10, 20, 35),
    "inside of rows": (0, 12, 23, 35),
    "several in one row": (0, 1, 3, 35),
    "one holds nothing": (0, 17, 17, 35),
    "the last holds nothing": (0, 18, 35, 35),
    "all with the last": (0, 0, 0, 35),
}
by_bounds = pytest.mark.parametrize("bounds", BOUNDS.values(), ids=BOUNDS)


def views_of(bounds, width=WIDTH):
    whole = ShardRange((ROWS, WIDTH), bounds, 0, FakeGroup(0, len(bounds) - 1))
    return [RowView(whole.on_meta(index), width) for index in range(len(bounds) - 1)]


def parts_of(flat, bounds):
    return [flat[a:b] for a, b in itertools.pairwise(bounds)]


@by_bounds
def test_each_process_sees_whole_rows_and_they_count_for_one(bounds):
    matrix = torch.arange(ROWS * WIDTH, dtype=torch.float64).view(ROWS, WIDTH)
    views, parts = views_of(bounds), parts_of(matrix.view(-1), bounds)
    completed = sum(view.parts_of_cut_rows(part) for view, part in zip(views, parts, strict=True))
    counted = []
    for view, part in zip(views, parts, strict=True):
        first, last = view.touched
        rows = view.rows(part, completed)
        assert torch.equal(rows, matrix[first:last])
        assert torch.equal(view.flat(rows), part)
        counted.append(view.counted_of(rows))
    assert torch.equal(torch.cat(counted), matrix), "each row counts once"


@by_bounds
def test_the_same_range_as_rows_of_another_width(bounds):
    """As groups of m are: 35 elements in rows of 7."""
    flat = torch.arange(35.0)
    views, parts = views_of(bounds, 7), parts_of(flat, bounds)
    completed = sum(view.parts_of_cut_rows(part) for view, part in zip(views, parts, strict=True))
    assert views[0].count == 5
    for view, part in zip(views, parts, strict=True):
        assert torch.equal(view.rows(part, completed), flat.view(5, 7)[slice(*view.touched)])


def test_rows_between_boundaries_are_a_view_and_nothing_is_sent():
    bounds = BOUNDS["between rows"]
    part = torch.arange(10.0)
    view = views_of(bounds)[0]
    assert complete_rows([view], [part]) == [None]
    assert view.gather_rows(part)[0].data_ptr() == part.data_ptr()
