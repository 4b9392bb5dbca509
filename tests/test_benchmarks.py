"""The harness around the figures: what is wrong is never timed, turns are fair, goals name something that is raced."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from benchmarks import floor, gpu_clock, memory, plan, results, table
from benchmarks.cases import CASES, HEADLINE, Case, inputs_of
from benchmarks.ops import RACES, race_of
from benchmarks.prefill import FULL_LAYERS, VICUNA_7B, saving
from benchmarks.presets import PRESETS
from benchmarks.race import OURS, PRODUCTS, Outcome, Race, run, schedule

ROOT = Path(__file__).parent.parent
SELECTORS = ("topk", "mmr", "mis", "maxmin", "dpp")


def small(case):
    return replace(case, n=48, d=16, k=12, shape=())


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_case_has_a_race_whose_variants_are_right(case):
    case = small(case)
    race = race_of(case, inputs_of(case), "reference")
    assert set(case.goals) <= set(race.peers) | set(race.yardsticks)
    for name, variant in {OURS: race.ours, **race.peers}.items():
        if name == "compiled step":  # takes a compiler and seconds; see test_peers.py
            continue
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
    assert calls["wrong"] == 1  # checked, and not run again


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


def batches(op, heads=1):
    same = Case(op, 48, 16, 12, "smooth", heads=heads, batch=3)
    return [same] if heads > 1 else [same, replace(same, n=78, k=17, batch=1, sizes=(40, 8, 30), keeps=(12, 1, 4))]


@pytest.mark.parametrize("op", [*SELECTORS, "idpruner", "d2pruner"])
def test_batched_and_packed_races_are_right(op):
    for case in batches(op):
        case = replace(case, data="gaussian") if op == "topk" else case
        race = race_of(case, inputs_of(case), "reference")
        for name, variant in {OURS: race.ours, **race.peers}.items():
            if name != "compiled step":
                assert race.check(variant()) == "", f"{case}: {name}"


@pytest.mark.parametrize("op", ["evs", "vidcom2"])
@pytest.mark.parametrize("k", [12, 31, 48])
def test_races_of_videos_keep_k_tokens(op, k):
    for shape in ((), (4, 3, 4)):
        case = Case(op, 48, 16, k, "smooth", shape=shape)
        race = race_of(case, inputs_of(case), "reference")
        for variant in (race.ours, *race.peers.values()):
            mask = variant()
            assert mask.shape == (48,) and int(mask.sum()) == k
            assert race.check(mask) == ""
            dropped, added = mask.nonzero()[:1], (~mask).nonzero()[-1:]
            mask[dropped], mask[added] = False, True
            assert k == 48 or race.check(mask) != ""


def test_races_of_videos_say_what_cannot_be():
    case = Case("evs", 48, 16, 11, "smooth", shape=(4, 3, 4))
    with pytest.raises(ValueError, match="evs keeps at least 12 tokens of a video of 4 frames, got K=11"):
        race_of(case, inputs_of(case), "reference")
    case = replace(case, op="vidcom2", k=12, shape=(), batch=3)
    with pytest.raises(ValueError, match="vidcom2 takes one video, got 3"):
        race_of(case, inputs_of(case), "reference")


@pytest.mark.parametrize("op", ["query_attention", "received_attention"])
def test_batched_attention_with_grouped_heads_is_right(op):
    (case,) = batches(op, heads=4)
    case = replace(case, kv_heads=2)
    race = race_of(case, inputs_of(case), "reference")
    assert [race.check(variant()) for variant in (race.ours, *race.peers.values())] == ["", ""]


@pytest.mark.parametrize("op", ["mmr", "mis", "maxmin", "dpp"])
def test_what_does_not_fit_is_not_tried(op, monkeypatch):
    """Linux would kill the process and lose the whole run."""
    case = Case(op, 48, 16, 12)
    race = race_of(case, inputs_of(case), "reference")
    dense = set(race.needs)
    assert dense and OURS not in dense
    monkeypatch.setattr("benchmarks.machine.free_bytes", lambda: 4 * 48 * 48 - 1)
    outcome = run(replace(race, peers={name: race.peers[name] for name in dense & set(race.peers)}), seconds=0.0)
    assert OURS in outcome.samples and dense <= set(outcome.failures)
    assert all("out of memory: needs about" in why for why in outcome.failures.values())


def test_floor_is_the_larger_of_reading_and_multiplying():
    machine = floor.Machine(bandwidth=1e9, matrix_rate=1e9, launch=1e-3)
    wide = floor.floor_of(Case("mmr", 1000, 100, 1), machine)
    assert (wide.read, wide.products) == ((400 * 1000 + 4 * 1000 + 8) / 1e9, 2e5 / 1e9)
    assert wide.seconds == wide.read + 1e-3
    many = floor.floor_of(Case("maxmin", 1000, 100, 500), machine)
    assert many.seconds == many.products + 1e-3 and many.products == (2 * 500 + 1000) * 1000 * 100 / 1e9
    packed = Case("mmr", 30, 8, 15, sizes=(10, 20), keeps=(5, 10))
    assert floor.work(packed)[1] == 2 * 8 * (10 * 5 + 20 * 10)
    assert floor.work(replace(packed, dtype=torch.bfloat16))[0] == 30 * 8 * 2 + 30 * 4 + 15 * 8


def test_d2pruner_saves_what_its_paper_reports_at_128_tokens():
    """LLaVA-1.5-7B at −74.2 % FLOPs: 128 of 576 visual tokens, pruned before layer 2, no text counted."""
    at = {k: saving(VICUNA_7B, 576, k, FULL_LAYERS["d2pruner"]) for k in (64, 128, 192)}
    assert abs(100 * at[128].flops_share - 74.2) < 2
    assert all(abs(100 * at[k].flops_share - 74.2) > 2 for k in (64, 192))
    assert at[128].cache_before == 576 * 32 * 2 * 4096 * 2
    assert at[128].cache_after == (2 * 576 + 30 * 128) * 2 * 4096 * 2


def test_prefill_of_a_7b_model_is_twice_its_weights_a_token():
    assert VICUNA_7B.prefill_flops(1) == pytest.approx(2 * 6.48e9, rel=0.01)
    assert saving(VICUNA_7B, 576, 576, 0).flops_share == 0


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_cases_that_can_be(name):
    cases = plan.cases(plan.Wanted(preset=name))
    assert {case.preset for case in cases} == {name}
    assert {case.op for case in cases} >= {"mmr", "mis", "maxmin", "dpp", "topk", "d2pruner", "idpruner"}
    for case in cases:
        case.check()
        assert case.sizes or case.grid[0] * case.grid[1] == case.n == PRESETS[name].n


def test_presets_have_the_stated_sizes():
    sizes = {name: preset.n for name, preset in PRESETS.items()}
    assert sizes["llava-1.5"] == 576 and sizes["llava-next"] == 2880 and sizes["internvl2.5"] == 10 * 256
    assert sizes["qwen2.5-vl"] == 2691 and sizes["qwen2.5-vl-video"] == 24576
    images = PRESETS["uniattn-13-images"].sizes
    assert len(images) == 13 and (min(images), max(images)) == (196, 324)


def test_the_standard_plan_has_every_op_and_every_goal():
    cases = plan.cases(plan.Wanted())
    assert {case.op for case in cases} == set(RACES) - set(plan.VIDEO)
    assert cases[: len(HEADLINE)] == list(HEADLINE)
    assert not set(HEADLINE) & set(plan.cases(plan.Wanted(tokens=(64,))))


def row(op="mmr", name=OURS, seconds=(1.0,), kind="flashprune", **more):
    case = {"op": op, "n": 8, "d": 4, "k": 2, "images": 1, "data": "photo", "dtype": "float32"}
    variant = {"name": name, "kind": kind, "status": "timed", "how": "wall clock", "seconds": list(seconds), **more}
    return {
        "case": {**case, "heads": 1, "kv_heads": 1, "preset": ""},
        "backend": "cpu",
        "floor": {"read": 0.1, "products": 0.2, "launch": 0.0, "seconds": 0.2, "prefill": 10.0},
        "saving": None,
        "variants": [variant],
    }


def test_cells_of_a_row():
    raced = row(seconds=(0.4, 0.5, 2.0))
    raced["variants"] += row(name="peer", kind="peer", seconds=(5.0,), goal=8)["variants"]
    raced["variants"].append({"name": "wrong", "kind": "peer", "status": "failed", "why": "not | right", "goal": 2})
    ours, peer, wrong = table.rows_of(raced)
    assert ours[4:] == ("500 (400–2,000)", "–", "40 %", "5 %")
    assert peer[4:] == ("5,000 (5,000–5,000)", "10 ×", "4 %", "50 %")
    assert wrong[4:] == ("FAILED", "–", "–", "–")
    assert [cells[4:6] for cells in table.goals([raced])] == [("10 ×", "≥ 8 ×: met"), ("–", "≥ 2 ×: missed")]
    assert list(table.problems([raced])) == ["FAILED, not timed: mmr 8 / 4 / 2: wrong: not | right"]


def test_only_ours_can_be_slower_than_allowed():
    old = {"rows": [row(seconds=(1.0, 2.0, 9.0)), row("mis"), row("dpp", "loop", kind="peer"), row("topk")]}
    new = {"rows": [row(seconds=(2.5,)), row("mis", seconds=(3.0,)), row("dpp", "loop", (9.0,), "peer"), row("maxmin")]}
    found = results.changes(old, new)
    assert [(change.case["op"], change.ratio) for change in found] == [("mmr", 1.25), ("mis", 3.0), ("dpp", 9.0)]
    assert [change.worse(1.3) for change in found] == [False, True, False]
    new["rows"][0]["variants"][0] |= {"status": "failed", "why": "wrong"}
    assert results.changes(old, new)[0].worse(1.3)


def test_ours_on_another_backend_is_another_variant():
    old, new = {"rows": [row()]}, {"rows": [{**row(), "backend": "triton"}]}
    assert results.changes(old, new) == []


class FakeCuda:
    """What the GPU's clock asks of torch.cuda, where a run takes the milliseconds that it is told to."""

    def __init__(self):
        self.now, self.allocated, self.peak = 0.0, 100, 100
        self.captured: list[list] = []
        self.capturing = False

    def __call__(self, milliseconds, waits=False):
        def run():
            if self.capturing and waits:
                raise RuntimeError("operation not permitted when stream is capturing")
            if self.capturing:
                self.captured[-1].append(milliseconds)
            else:
                self.now += milliseconds

        return run

    def Event(self, enable_timing):
        cuda = self

        class Event:
            def record(self):
                self.at = cuda.now

            def synchronize(self):
                pass

            def elapsed_time(self, end):
                return end.at - self.at

        return Event()

    def CUDAGraph(self):
        calls = []
        self.captured.append(calls)
        return SimpleNamespace(replay=lambda: setattr(self, "now", self.now + sum(calls)))

    @contextmanager
    def graph(self, graph):
        self.capturing = True
        try:
            yield
        finally:
            self.capturing = False

    def synchronize(self):
        pass

    def reset_peak_memory_stats(self):
        self.peak = self.allocated

    def memory_allocated(self):
        return self.allocated

    def max_memory_allocated(self):
        return self.peak


@pytest.fixture
def gpu(monkeypatch):
    fake = FakeCuda()
    empty = lambda size, dtype, device: torch.empty(8, dtype=dtype)  # noqa: E731
    monkeypatch.setattr(gpu_clock, "torch", SimpleNamespace(cuda=fake, empty=empty, int8=torch.int8))
    return fake


def test_a_quick_kernel_is_timed_by_graph_on_rotating_inputs(gpu):
    race = Race(ours=gpu(0.05), peers={"waits": gpu(0.01, waits=True), "slow": gpu(3.0)}, check=lambda picks: "")
    clock = gpu_clock.GpuClock(lambda: replace(race, ours=gpu(0.01)), input_bytes=gpu_clock.COLD // 4)
    sample, how = clock.sampler(race, OURS, once=1e-4)
    assert gpu.captured == [[0.05, 0.01, 0.01, 0.01, 0.01]]
    assert sample() == pytest.approx(1e-3 * 0.09 / 5) and how.endswith("5 calls on as many inputs, L2 cold")
    for name, seconds in (("waits", 1e-5), ("slow", 3e-3)):
        sample, how = clock.sampler(race, name, once=seconds)
        assert (sample(), how) == (pytest.approx(seconds), "events, cold L2"), name


def test_peak_memory_on_a_gpu_is_above_what_was_there(gpu):
    clock = gpu_clock.GpuClock(lambda: None, 1)
    clock.peak_bytes()
    gpu.peak, gpu.allocated = 170, 120  # a result of 20 stays
    assert clock.peak_bytes() == 70
    assert clock.peak_bytes() == 0
