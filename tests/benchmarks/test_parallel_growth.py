"""Growth in the number of ranks, as computed by benchmarks/parallel.py."""

from benchmarks.parallel import growth


def line(ranks, group, ms, mib, sent):
    return {"ranks": ranks, "group": group, "ms_per_update": ms, "expert_mib": mib, "bytes_sent_per_token": sent}


def test_growth_in_ranks_uses_only_runs_with_sharded_experts():
    lines = [line(1, 1, 800, 48, 0), line(2, 1, 1, 1, 1), line(2, 2, 400, 24, 1024), line(4, 4, 200, 12, 1024)]
    assert growth(lines) == {"ms_per_update": -1, "expert_mib": -1, "bytes_sent_per_token": 0}


def test_one_number_of_ranks_has_no_growth():
    assert growth([line(1, 1, 800, 48, 0)]) == {}
