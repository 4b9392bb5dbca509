"""The engine's team of threads: the same picks with any number of threads, from several at once, and after a fork."""

import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import torch

import flashprune as fp

pytestmark = pytest.mark.skipif(fp.backends()["cpu"] != "ready", reason="the native library is not built")


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def inputs(n: int = 600, d: int = 512) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, d, generator=generator).relu(), torch.rand(n, generator=generator)


INPUTS = inputs()


def select() -> torch.Tensor:
    return fp.mmr_select(*INPUTS, 150, sort=False, backend="cpu")


@pytest.mark.parametrize("threads", [2, 3, 8])
def test_any_number_of_threads(threads: int) -> None:
    torch.set_num_threads(1)
    alone = select()
    torch.set_num_threads(threads)
    for _ in range(20):
        assert torch.equal(select(), alone)


def test_ragged_batches_share_the_threads() -> None:
    features, _ = inputs(1200)
    sizes = [0, 1, 299, 300, 7, 250, 343]
    bounds = torch.tensor([0, *sizes], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    ks = [n // 3 for n in sizes]
    torch.set_num_threads(1)
    alone = fp.maxmin_select(features, ks, cu_seqlens=bounds, sort=False, backend="cpu")
    torch.set_num_threads(3)
    assert torch.equal(fp.maxmin_select(features, ks, cu_seqlens=bounds, sort=False, backend="cpu"), alone)


@pytest.mark.parametrize("threads", [1, 3])
def test_the_callers_flushing_of_subnormals_changes_nothing(threads: int) -> None:
    """Squares of these rows are subnormal, their norms are not."""
    torch.set_num_threads(threads)
    features, importance = INPUTS[0] * 1e-20 * (1 + torch.arange(600)[:, None] / 60), INPUTS[1] / 16

    def select() -> list[torch.Tensor]:
        native = fp.mmr_select(features, importance, 150, sort=False, backend="cpu")
        return [native, fp.reference.mmr_select(features, importance, 9, sort=False)]

    expected = select()
    fp.testing.check_selection("mmr", features, importance, picks=expected[0]).raise_if_bad()
    assert not torch.equal(expected[0], fp.topk_select(importance, 150, sort=False))  # not all are zero rows
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush")
    try:
        flushed = select()
        product = torch.tensor(1e-25) * 1e-15
    finally:
        torch.set_flush_denormal(False)
    assert product == 0  # the caller's own arithmetic stays flushed
    assert all(torch.equal(a, b) for a, b in zip(flushed, expected, strict=True))


def test_calls_at_once() -> None:
    torch.set_num_threads(2)
    alone = select()
    with ThreadPoolExecutor(4) as executor:
        for picks in [executor.submit(select) for _ in range(40)]:
            assert torch.equal(picks.result(), alone)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_after_a_fork() -> None:
    torch.set_num_threads(2)
    alone = select()  # the parent's team exists now; the child has none of its threads
    child = os.fork()
    if child == 0:  # only the selection: torch's own thread pool does not survive a fork
        os._exit(0 if torch.equal(select(), alone) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@contextmanager
def alarms(*, raising: bool) -> Iterator[list[int]]:
    """SIGALRM every 20 ms; the numbers that its handler was run with. Raising, it raises at the third."""
    ran: list[int] = []

    def handler(number: int, frame: object) -> None:
        ran.append(number)
        if raising and len(ran) == 3:
            raise TimeoutError("third alarm")

    before = signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, 0.02, 0.02)
    try:
        yield ran
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


SIZES = (4000, 8000, 16000, 32000)  # one of them takes long enough for three alarms, on a fast machine too


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("segments", [1, 40])
@pytest.mark.parametrize("method", ["maxmin", "mmr", "dpp"])
def test_a_signal_stops_a_long_call(method: str, segments: int, threads: int) -> None:
    """An engine that looks for signals only when it is done has the handler run once a call."""
    torch.set_num_threads(threads)
    for size in SIZES:
        n, d = size // int(segments**0.5), 1024 if method == "dpp" else 64  # dpp ends early where the rank is used up
        features, importance = (x.expand(segments, *x.shape) for x in inputs(n, d))
        more = () if method == "maxmin" else (importance,)
        try:
            with alarms(raising=True):
                getattr(fp, f"{method}_select")(features, *more, n // 2, backend="cpu")
        except TimeoutError as caught:
            assert str(caught) == "third alarm" and caught.__context__ is None
            break
    else:
        pytest.fail("no call was stopped")
    assert torch.equal(select(), select())  # the team works on


def test_handlers_that_raise_nothing_run_during_a_call() -> None:
    for size in SIZES:
        features, _ = inputs(size, 64)
        with alarms(raising=False) as ran:
            picks = fp.maxmin_select(features, size // 2, backend="cpu")
            if len(ran) > 2:
                break
    else:
        pytest.fail("no handler ran during a call")
    assert torch.equal(picks, fp.maxmin_select(features, size // 2, backend="cpu"))


def test_signals_stop_the_main_threads_call_alone() -> None:
    with ThreadPoolExecutor(1) as executor:
        running = executor.submit(fp.maxmin_select, inputs(6000, 64)[0], 3000, backend="cpu")
        with pytest.raises(TimeoutError, match="third alarm"), alarms(raising=True):
            fp.maxmin_select(inputs(32000, 64)[0], 16000, backend="cpu")
        assert len(running.result()) == 3000
