"""Load time of a stage: the parts add up, the counts are the filter's, and the page cache is asked, not guessed."""

from __future__ import annotations

import pytest

from glmpp.errors import GlmppError
from glmpp.lab.load_time import FLOOR, GLMPP, PARTS, STOCK, LoadTimes, load_times, project
from glmpp.partition import OTHER_STAGE, make_stages, stage_bytes

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm


@pytest.fixture(scope="module")
def warm(tiny) -> LoadTimes:
    return load_times(tiny, 4, ranks=[0, 1, 2, 3], repeats={STOCK: 3, GLMPP: 3, FLOOR: 3})


def test_every_load_is_a_row_whose_parts_add_up(tiny, warm):
    assert len(warm.rows) == 4 * 3 * 3
    assert warm.rows[[*PARTS]].sum(axis=1).to_numpy() == pytest.approx(warm.rows.total.to_numpy())
    assert (warm.rows[[*PARTS]] >= 0).all(axis=None)
    middle = warm.median()
    for (rank, form), row in middle.iterrows():
        totals = warm.rows[(warm.rows["rank"] == rank) & (warm.rows.format == form)].total
        assert row.total == sorted(totals)[1]


def test_counts_are_those_of_the_filter(tiny, warm):
    stages = make_stages(tiny.config, 4)
    for (rank, form), row in warm.median().iterrows():
        wanted = [spec for spec in tiny.values() if form == STOCK or stages[rank].owner(spec.name) != OTHER_STAGE]
        assert (row.tensors, row.bytes_handed) == (len(wanted), sum(spec.nbytes for spec in wanted))
        assert row.files_opened == (0 if form == FLOOR else len({spec.file for spec in wanted}))


def test_a_saved_table_comes_back(warm, tmp_path):
    warm.save(tmp_path / "warm.json")
    back = LoadTimes.load(tmp_path / "warm.json")
    assert back.recorded.startswith("on 20") and back.source.startswith("recorded on 20") and warm.source.startswith("live")
    assert back.median().total.to_dict() == pytest.approx(warm.median().total.to_dict())


def test_cold_starts_with_no_page_of_the_shards_and_ends_with_at_least_the_stages(tiny):
    cold = load_times(tiny, 4, ranks=[1], repeats={GLMPP: 1}, cache="cold")
    (row,) = cold.rows.to_dict("records")
    if row["bytes_in_cache_before"] > 0:
        pytest.skip("this file system keeps its pages")
    assert row["bytes_read"] >= stage_bytes(tiny, make_stages(tiny.config, 4))[1]


def test_a_projection_is_what_was_measured_plus_bytes_over_the_rate(tiny, warm, full):
    projected = project(warm, tiny, full, 4, 1e9)
    kept = stage_bytes(full, make_stages(full.config, 4))
    measured = warm.median()
    for rank in range(4):
        added = projected.loc[(rank, GLMPP), "vllm"] - measured.loc[(rank, GLMPP), "vllm"]
        assert added == pytest.approx(kept[rank] / 1e9)
        assert projected.loc[(rank, STOCK), "choosing"] == 0 < projected.loc[(rank, GLMPP), "choosing"]


def test_bad_arguments_are_refused(tiny, full):
    with pytest.raises(GlmppError, match="needs a checkpoint with files"):
        load_times(full, 4)
    with pytest.raises(GlmppError, match="choose warm or cold"):
        load_times(tiny, 4, cache="lukewarm")
