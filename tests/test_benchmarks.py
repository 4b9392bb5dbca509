"""The harness around the figures: what is wrong is never timed, turns are fair, goals name something that is raced."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from benchmarks import memory, table
from benchmarks.cases import CASES, MEMORY, Case, inputs_of
from benchmarks.ops import RACES, race_of
from benchmarks.race import OURS, PRODUCTS, Outcome, Race, run, schedule

ROOT = Path(__file__).parent.parent
SELECTORS = ("topk", "mmr", "mis", "maxmin", "dpp")


def small(case):
    return replace(case, n=48, d=16, k=12)


@pytest.mark.parametrize("case", CASES + MEMORY, ids=str)
def test_every_case_has_a_race_whose_variants_are_right(case):
    case = small(case)
    race = race_of(case, inputs_of(case), "reference")
    assert set(case.goals) <= set(race.peers) | set(race.yardsticks)
    for name, variant in {OURS: race.ours, **race.peers}.items():
        assert race.check(variant()) == "", name


@pytest.mark.parametrize("op", SELECTORS)
def test_check_refuses_a_wrong_pick(op):
    case = Case(op, 48, 16, 12, "gaussian")
    race = race_of(case, inputs_of(case), "reference")
    picks = race.ours()
    left_out = next(i for i in range(case.n - 1, -1, -1) if i not in picks.tolist())
    assert race.check(torch.cat([picks[:5], torch.tensor([left_out]), picks[6:]])) != ""


def test_check_refuses_a_wrong_score():
    case = Case("query_attention", 48, 16, 12, heads=4)
    race = race_of(case, inputs_of(case), "reference")
    assert race.check(race.ours() * 1.001) != ""


def test_a_variant_that_fails_is_reported_and_not_timed():
    def raises():
        raise MemoryError("no room for N×N")

    calls = Counter()

    def wrong():
        calls["wrong"] += 1
        return torch.tensor([1])

    race = Race(
        ours=lambda: torch.tensor([0]),
        peers={"wrong": wrong, "raises": raises},
        check=lambda picks: "" if picks.item() == 0 else "not 0",
    )
    outcome = run(race, seconds=0.0)
    assert outcome.failures == {"wrong": "not 0", "raises": "MemoryError: no room for N×N"}
    assert set(outcome.samples) == {OURS} and len(outcome.samples[OURS]) == 3
    assert calls["wrong"] == 1
    rows = list(table.rows_of(Case("mmr", 8, 4, 2, goals={"wrong": 10}), race, outcome))
    assert [row[5] for row in rows] == ["FAILED", "FAILED"]
    assert rows[0][7].endswith("missed")


def test_turns_are_spread():
    order = schedule({"fast": 0.1, "slow": 1.0, "slowest": 50.0}, seconds=1.25)
    assert Counter(order) == {"fast": 12, "slow": 3, "slowest": 3}
    gaps = [i for i, name in enumerate(order) if name == "slow"]
    assert all(order[a:b].count("fast") == 4 for a, b in pairwise(gaps))


def test_ratio_is_of_medians_and_says_who_is_slower():
    outcome = Outcome({OURS: [1.0, 2.0, 9.0], "peer": [6.0, 1.0, 8.0], PRODUCTS: [1.0]})
    assert outcome.ratio("peer") == 3.0
    assert outcome.ratio(OURS, PRODUCTS) == 2.0
    assert outcome.ratio("absent") is None


@pytest.mark.parametrize("data", ["photo", "smooth", "gaussian"])
def test_inputs_are_the_same_on_every_call(data):
    case = Case("mmr", 60, 24, 6, data)
    first = inputs_of(case)
    inputs_of.cache_clear()
    again = inputs_of(case)
    assert first["features"].shape == (60, 24) and first["importance"].shape == (60,)
    assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.skipif(not memory.supported(), reason="peak memory is read from /proc, which this system lacks")
def test_peak_memory_sees_the_dense_matrix():
    n = 3000
    peak = memory.peak_extra_mb(Case("mmr", n, 16, 2, "gaussian"), "reference", "AngelSlim loop")
    assert 4 * n * n <= peak * memory.MB < 3 * 4 * n * n


def test_table_prints_a_row_a_peer(monkeypatch, capsys):
    monkeypatch.setattr(table, "HEADLINE", tuple(map(small, table.HEADLINE[:2])))
    assert table.main(["--backend", "reference", "--seconds", "0", "--no-memory"]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| mmr")]
    assert len(rows) == 2 and all("AngelSlim loop" in row and "≥ 10 ×" in row for row in rows)


def test_pytest_benchmark_files_run_and_keep_the_ratio(tmp_path):
    file = tmp_path / "figures.json"
    command = ["benchmarks/bench_topk.py", "-k", "576", "--benchmark-only", f"--benchmark-json={file}"]
    options = ["--backend=reference", "--seconds=0", "-p", "no:cacheprovider", "-p", "no:xdist"]
    alone = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    subprocess.run(
        [sys.executable, "-m", "pytest", "-q", *command, *options], cwd=ROOT, env=alone, check=True, capture_output=True
    )
    (figures,) = json.loads(file.read_text())["benchmarks"]
    extra = figures["extra_info"]
    assert (extra["N"], extra["K"], extra["failures"]) == (576, 64, {})
    assert extra["ratios"]["torch.topk"] > 0 and extra["machine"]["torch"] == torch.__version__
    assert figures["stats"]["rounds"] == 3


def test_every_op_has_a_case():
    assert {case.op for case in CASES} == set(RACES)
