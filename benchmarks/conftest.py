"""pytest-benchmark harness: ``bench_<op>`` functions, one case of the table each, peers timed between our rounds."""

from __future__ import annotations

from collections.abc import Callable
from itertools import takewhile
from statistics import median

import pytest
from torch import Tensor

from . import machine
from .cases import CASES, Case, inputs_of
from .race import OURS, Race, qualify, schedule, timed

MakeRace = Callable[[Case, dict[str, Tensor], str], Race]


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("flashprune")
    group.addoption("--backend", default="cpu", help="flashprune backend to time (default: cpu)")
    group.addoption("--seconds", type=float, default=2.0, help="time spent on a variant of a case (default: 2)")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("python_files", "bench_*.py")
    config.addinivalue_line("python_functions", "bench_*")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        metafunc.parametrize("case", [case for case in CASES if case.op in metafunc.module.RACES], ids=str)


@pytest.fixture(scope="session")
def machine_facts() -> dict[str, str]:
    return machine.facts()


@pytest.fixture
def contest(benchmark, request, machine_facts) -> Callable[[Case, MakeRace], None]:
    """Times flashprune through pytest-benchmark; a round's setup, itself not timed, gives the others their turn."""
    backend, seconds = request.config.getoption("--backend"), request.config.getoption("--seconds")

    def run(case: Case, make_race: MakeRace) -> None:
        race = make_race(case, inputs_of(case), backend)
        outcome, warmup = qualify(race)
        if OURS in outcome.failures:
            pytest.fail(f"flashprune: {outcome.failures[OURS]}")
        order = schedule(warmup, seconds)
        outcome.samples = {name: [] for name in warmup if name != OURS}
        upcoming = iter(order)

        def others_turn() -> None:
            for name in takewhile(lambda name: name != OURS, upcoming):
                outcome.samples[name].append(timed(race.variants[name]))

        benchmark.group = f"{case.op} {case.n}/{case.d}/{case.k}"
        benchmark.pedantic(race.ours, setup=others_turn, rounds=order.count(OURS))
        others_turn()
        if benchmark.stats is not None:  # None under --benchmark-disable
            outcome.samples[OURS] = list(benchmark.stats.stats.data)
        benchmark.extra_info.update(
            N=case.n,
            D=case.d,
            K=case.k,
            data=case.data,
            dtype=case.dtype_name,
            backend=backend,
            machine=machine_facts,
            medians_ms={name: 1e3 * median(samples) for name, samples in outcome.samples.items() if samples},
            ratios={name: outcome.ratio(name) for name in outcome.samples if name != OURS},
            failures=outcome.failures,
        )

    return run
