"""What ranks read of tensors: the arithmetic of regions against arrays of single elements."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glmpp.dryrun.cuts.regions import between_ranks, compared, covered, groups, ranges

ROWS, COLUMNS, WIDTH = 6, 48, 2  # of a tensor, and bytes of an element


def columns(first: int, after: int, size: int = COLUMNS) -> tuple:
    return ((first * WIDTH, (after - first) * WIDTH, ((size * WIDTH, ROWS),)),)


def rows(first: int, after: int) -> tuple:
    return ((first * COLUMNS * WIDTH, (after - first) * COLUMNS * WIDTH, ()),)


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 5), st.integers(1, 6)), min_size=1, max_size=4))
@settings(max_examples=50, deadline=None)
def test_ranges_are_those_of_an_array_of_elements(parts):
    table, regions = np.zeros((ROWS, COLUMNS), bool), []
    for in_rows, first, count in parts:
        if in_rows:
            table[first : first + count] = True
            regions += rows(first, min(first + count, ROWS))
        else:
            table[:, 8 * first : 8 * first + count] = True
            regions += columns(8 * first, 8 * first + count)
    unit, seen = covered(tuple(sorted(regions)), ROWS * COLUMNS * WIDTH)
    assert seen.sum() * unit == table.sum() * WIDTH
    for dimension in (0, 1):
        held = np.zeros((ROWS, COLUMNS)[dimension], bool)
        for first, after in ranges(seen, unit, (ROWS, COLUMNS), ROWS * COLUMNS * WIDTH, dimension):
            held[first:after] = True
        assert (held == table.any(axis=1 - dimension)).all()


@pytest.mark.parametrize("tp", [2, 4, 8])
def test_what_middle_ranks_read_follows_from_the_first_and_the_last(tp):
    part = COLUMNS // tp
    size = ROWS * COLUMNS * WIDTH
    _, seen = covered(between_ranks(columns(0, part), columns(COLUMNS - part, COLUMNS), (tp, 1)), size)
    assert seen.all()


def test_heads_that_several_ranks_hold_are_no_cut():
    _, seen = covered(between_ranks(columns(0, 24), columns(24, 48), (8, 1)), ROWS * COLUMNS * WIDTH)
    assert seen.all()


def test_a_last_rank_that_leaves_the_end_shows():
    _, seen = covered(between_ranks(columns(0, 5), columns(35, 40), (8, 1)), ROWS * COLUMNS * WIDTH)
    assert not seen.all()


def test_ranks_that_do_not_follow_each_other_have_to_be_run():
    assert between_ranks(columns(0, 5), columns(36, 41), (8, 1)) is None
    assert between_ranks(columns(0, 6), (), (8, 1)) is None


@pytest.mark.parametrize("group", [16, 32, 128])
@pytest.mark.parametrize("size", [640, 1856, 576, 1024])
@pytest.mark.parametrize("tp", [2, 4, 8, 16])
def test_a_part_fits_its_scales_where_every_element_finds_its_own(group, size, tp):
    """A loader that takes shape // tp of weights and scales alike, beside a look at each element."""
    count, part = math.ceil(size / group), size // tp
    scales = count // tp
    if not scales:
        return
    for rank in range(tp):
        own, theirs = (rank * part, (rank + 1) * part), (rank * scales, (rank + 1) * scales)
        right = all((at - own[0]) // group + theirs[0] == at // group < theirs[1] for at in range(*own))
        weight = ((ROWS, size), ROWS * size * WIDTH, columns(*own, size))
        scale = ((ROWS, count), ROWS * count * WIDTH, columns(*theirs, count))
        assert (compared(weight, scale, False) is None) == right


@pytest.mark.parametrize("group", [16, 32, 128])
@pytest.mark.parametrize(("size", "tp"), [(640, 2), (1856, 8), (1024, 16), (1024, 2), (512, 16)])
def test_a_part_that_reads_just_the_scales_it_needs_fits_where_every_element_finds_its_own(group, size, tp):
    """As vLLM 0.33.0 takes them; a part may lie within one group."""
    count, part = math.ceil(size / group), size // tp
    for rank in range(tp):
        own = rank * part, (rank + 1) * part
        theirs = own[0] // group, math.ceil(own[1] / group)
        right = all((at - own[0]) // group + theirs[0] == at // group for at in range(*own))
        weight = ((ROWS, size), ROWS * size * WIDTH, columns(*own, size))
        scale = ((ROWS, count), ROWS * count * WIDTH, columns(*theirs, count))
        assert (compared(weight, scale, False) is None) == (right or theirs == (0, count))


def test_sizes_of_groups():
    assert groups(928, 116) == [8]
    assert groups(576, 5) == [128]
    assert groups(250, 2) == [125, 128]
    assert groups(64, 512) == [1 / 8]
    assert groups(512, 1) == []
