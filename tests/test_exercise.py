"""The exercise of notebook 00 tells the fix from everything that looks like it."""

from __future__ import annotations

import nbformat
import pytest
from conftest import ROOT

from glmpp.lab.exercise import CASES, check, judge
from glmpp.loader import (
    WatchedBuffer,
    indexer_wk_part,
    load_fp8_indexer_wk,
    load_fp8_indexer_wk_late_skip,
    load_fp8_indexer_wk_unguarded,
    load_stage,
    store_wk,
)
from glmpp.partition import make_stages


def wrong(helper) -> set[str]:
    table = judge(helper)
    return set(table.index[table.verdict != "match"])


def asked_first(name, tensor, pending, params, loaded, pp_missing_layer_names):
    """Another right way: the question before anything else, one prefix at a time."""
    if any(name.startswith(prefix) for prefix in pp_missing_layer_names):
        return True
    return load_fp8_indexer_wk_unguarded(name, tensor, pending, params, loaded, pp_missing_layer_names)


def by_layer_number(name, tensor, pending, params, loaded, pp_missing_layer_names):
    """And another, that buffers under names of its own."""
    part = indexer_wk_part(name, tensor)
    if part is None:
        return False
    layer = name.rsplit(".wk.", 1)[0]
    if f"{layer}.wk_weights_proj.weight" not in params:
        return True
    pair = pending.setdefault(layer, {})
    pair[part] = tensor
    if pair.keys() == {"weight", "scale"}:
        store_wk(layer, pending, params, loaded)
    return True


@pytest.mark.parametrize("helper", [load_fp8_indexer_wk, asked_first, by_layer_number])
def test_right_answers_match_in_every_case(helper):
    assert wrong(helper) == set()


def without_the_dot(name, tensor, pending, params, loaded, pp_missing_layer_names):
    prefixes = [prefix.removesuffix(".") for prefix in pp_missing_layer_names]
    return load_fp8_indexer_wk(name, tensor, pending, params, loaded, prefixes)


def drops_everything(name, *_):
    return True


def dies_quietly(name, tensor, pending, params, loaded, pp_missing_layer_names):
    try:
        return load_fp8_indexer_wk_unguarded(name, tensor, pending, params, loaded, pp_missing_layer_names)
    except KeyError:
        return True


def forgets_loaded(name, tensor, pending, params, loaded, pp_missing_layer_names):
    return load_fp8_indexer_wk(name, tensor, pending, params, set(), pp_missing_layer_names)


def counts_foreign_as_loaded(name, tensor, pending, params, loaded, pp_missing_layer_names):
    if name.startswith(tuple(pp_missing_layer_names)):
        loaded.add(name)
    return load_fp8_indexer_wk(name, tensor, pending, params, loaded, pp_missing_layer_names)


FOREIGN = {
    "another stage's layer",
    "another stage's layer, scale first",
    "another stage's weight, its scale still to come",
}


@pytest.mark.parametrize(
    ("helper", "cases"),
    [
        (load_fp8_indexer_wk_unguarded, FOREIGN),
        (load_fp8_indexer_wk_late_skip, FOREIGN),
        (counts_foreign_as_loaded, FOREIGN),
        (without_the_dot, {"layer 11 is held, layer 1 is not"}),
        (drops_everything, {case.what for case in CASES if case.spec != "dropped"}),
        (dies_quietly, {"another stage's weight, its scale still to come"}),
        (forgets_loaded, {case.what for case in CASES if case.spec == "stored"}),
        (lambda *_: None, {case.what for case in CASES}),
        (lambda: None, {case.what for case in CASES}),
    ],
)
def test_wrong_answers_differ_where_they_are_wrong(helper, cases):
    assert wrong(helper) == cases


def test_the_check_prints_yours_beside_spec_and_says_what_to_look_at_first(capsys):
    figure = check(load_fp8_indexer_wk_unguarded)
    said = capsys.readouterr().out
    assert "Yours" in said and "Spec" in said and "Not yet: another stage's layer." in said
    assert figure.axes
    check(load_fp8_indexer_wk)
    assert f"{len(CASES)} of {len(CASES)} cases match" in capsys.readouterr().out


def cell_of_the_exercise() -> str:
    cells = nbformat.read(ROOT / "notebooks" / "00_start_here.ipynb", as_version=4).cells
    (source,) = (cell.source for cell in cells if cell.cell_type == "code" and "check(my_helper)" in cell.source)
    return source


def test_the_committed_notebook_shows_it_unsolved_and_the_folded_answer_solves_it(capsys):
    cells = nbformat.read(ROOT / "notebooks" / "00_start_here.ipynb", as_version=4).cells
    shown = next(cell for cell in cells if "check(my_helper)" in cell.source)
    assert "Not yet" in str(shown.outputs) and not [o for o in shown.outputs if o.output_type == "error"]
    answer = next(cell.source for cell in cells if "<details>" in cell.source)
    lines = answer.split("```python\n")[1].split("```")[0]
    where = '    layer = name.rsplit(".wk.", 1)[0]'
    names = {"check": check, "indexer_wk_part": indexer_wk_part, "store_wk": store_wk}
    exec(cell_of_the_exercise().replace(where, lines + where), names)
    assert "this is the fix" in capsys.readouterr().out


def test_a_watched_buffer_remembers_what_went_through_it(tiny):
    stage = make_stages(tiny.config, 4)[1]
    own, all_of_them = WatchedBuffer(), WatchedBuffer()
    load_stage(tiny, stage, pending=own)
    load_stage(tiny, stage, helper=load_fp8_indexer_wk_late_skip, pending=all_of_them)
    assert [int(layer.split(".")[2]) for layer in own.entered] == list(stage.layers) and not own
    assert len(all_of_them.entered) == 12 and len(all_of_them) == 9
