"""The engine's team of threads: the same picks with any number of threads, from several at once, and after a fork."""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

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
