"""The emulation that runs the CUDA kernels in tests: what its intrinsics give, and the mistakes that it must show."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tests import sanitized
from tests.emulated import SEEDS, numbers

ROOT = Path(__file__).resolve().parent.parent
MUTANTS = ROOT / "csrc" / "emulation" / "mutants.cpp"
TOKENS = 384  # of every kernel in mutants.cpp, in 3 blocks

Array = NDArray[np.int32]


@pytest.fixture(scope="module")
def mutants(emulation: ModuleType) -> ModuleType:
    return emulation.mutants


def values(count: int, low: int = -100, high: int = 100) -> Array:
    return np.random.default_rng(count).integers(low, high, count, dtype=np.int32)


# ---- what the intrinsics give


def defined(x: Array) -> dict[str, Array]:
    """The results of mutants.cpp, intrinsics_kernel, one a thread, by what CUDA says of each."""
    warps = x.reshape(-1, 32)
    lanes = np.arange(32)

    def take(source: Array) -> Array:
        return warps[:, source]

    def each(of_warp: Callable[[Array], Array | int]) -> Array:
        return np.stack([np.broadcast_to(of_warp(w), 32) for w in warps])

    def bits(votes: Array) -> int:
        return int((votes.astype(np.int64) << lanes).sum())

    unsigned = warps.view(np.uint32)
    best = max(range(len(x)), key=lambda i: (x[i], -i))
    results = {
        "shfl": take(lanes * 7 % 32),
        "shfl_8": take(lanes // 8 * 8 + 3),
        "xor": take(lanes ^ 5),
        "xor_8": take(np.where((lanes ^ 12) // 8 <= lanes // 8, lanes ^ 12, lanes)),
        "up": take(np.where(lanes >= 3, lanes - 3, lanes)),
        "down": take(np.where(lanes % 16 < 13, lanes + 3, lanes)),
        "ballot": each(lambda w: bits(w & 1)),
        "any": each(lambda w: (w == x[5]).any()),
        "all": each(lambda w: (w != x[5]).all()),
        "match": each(lambda w: np.array([bits(np.fmod(w, 5) == v) for v in np.fmod(w, 5)])),
        "max": each(np.max),
        "min": each(np.min),
        "add": each(np.sum),
        "max_u": unsigned.max(1, keepdims=True),
        "and_u": np.bitwise_and.reduce(unsigned, 1, keepdims=True),
        "or_u": np.bitwise_or.reduce(unsigned, 1, keepdims=True),
        "xor_u": np.bitwise_xor.reduce(unsigned, 1, keepdims=True),
        "odd_lanes": np.where(lanes % 2, warps[:, 1::2].sum(1, keepdims=True), 0),
        "sync_count": np.full(warps.shape, (x & 1).sum()),
        "sync_or": np.full(warps.shape, 1),
        "sync_and": np.full(warps.shape, 0),
        "block_max": np.full(warps.shape, best),
        "block_sum": np.full(warps.shape, x.sum()),
        "before": (np.cumsum(x) - x).reshape(warps.shape),
    }
    return {name: np.broadcast_to(of, warps.shape).astype(np.int64).astype(np.int32) for name, of in results.items()}


@pytest.mark.parametrize("seed", SEEDS)
def test_intrinsics(mutants: ModuleType, seed: int) -> None:
    x = values(96)
    got, expected = mutants.intrinsics(x, seed), defined(x)
    assert list(got) == list(expected)
    for name, result in expected.items():
        np.testing.assert_array_equal(got[name].reshape(-1, 32), result, err_msg=name)


@pytest.mark.parametrize("seed", SEEDS)
def test_atomics(mutants: ModuleType, seed: int) -> None:
    count = 2 * 64
    places, memory = mutants.atomics(2, 64, seed)
    assert sorted(places) == list(range(count))
    assert memory[:5].tolist() == [count, count - 1, 0, ~255, 255]
    exchanged = [*memory[7:], memory[5]]
    assert sorted(exchanged) == [-1, *range(count)]
    assert memory[6] == 2 * count


@pytest.mark.parametrize("as_matrices", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_matrix_product(mutants: ModuleType, dtype: torch.dtype, as_matrices: bool) -> None:
    depth = 8 if dtype == torch.float32 else 16
    generator = torch.Generator().manual_seed(depth)
    a = (torch.randint(-8, 9, (16, depth), generator=generator) / 4).to(dtype)
    b = (torch.randint(-8, 9, (8, depth), generator=generator) / 4).to(dtype)
    got = mutants.matrix_product(numbers(a), numbers(b), as_matrices, 0)
    np.testing.assert_array_equal(got, 1.0 + (a.float() @ b.float().T).numpy())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_matrix_products_are_cut_off(mutants: ModuleType, dtype: torch.dtype) -> None:
    """Added to 1: what is below the last bit of float32 but one is lost, of each product and of the sum of a block."""
    depth = 8 if dtype == torch.float32 else 16
    b = torch.full((8, depth), 2.0**-12, dtype=dtype)

    def added(*products: float) -> float:
        a = torch.zeros(16, depth, dtype=dtype)
        a[:, : len(products)] = torch.tensor(products) * 2.0**12
        got = mutants.matrix_product(numbers(a), numbers(b), False, 0)
        assert (got == got[0, 0]).all()
        return float(got[0, 0]) - 1.0

    assert added(1.5 * 2.0**-24) == 0.0  # to the nearest it would be 2**-23
    assert added(2.0**-24, 2.0**-24) == 2.0**-23
    assert added(*[0.75 * 2.0**-24] * 4) == 0.0
    assert added(*[-0.75 * 2.0**-24] * 4) == 0.0
    assert added(*[1.75 * 2.0**-24] * 4) == 2.0**-22
    assert added(2.0**-24, 0.0, 0.0, 0.0, *[0.0] * (depth // 2 - 4), 2.0**-24) == 0.0  # one in each block


def test_tf32_has_no_low_bits(mutants: ModuleType) -> None:
    a = np.zeros((16, 8), np.float32)
    a[:, 0] = 1.0 + 2.0**-11
    b = np.ones((8, 8), np.float32)
    assert (mutants.matrix_product(a, b, False, 0) == 2.0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_number_of_16_bits(mutants: ModuleType, dtype: torch.dtype) -> None:
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    np.testing.assert_array_equal(mutants.floats(numbers(every)), every.float().numpy())


# ---- mistakes that give a wrong result

REVERSED = {
    "block_reverse": 128,  # which tokens each kernel reverses together
    "block_reverse_in_rounds": 128,
    "warp_reverse": 32,
    "grid_reverse": 384,
    "last_block_reverse": 384,
    "workspace_reverse": 128,
    "copied_reverse": 128,
    "counted_reverse": 128,
}


def right(name: str, x: Array) -> Array:
    return x.reshape(-1, REVERSED[name])[:, ::-1].ravel()


@pytest.mark.parametrize("name", REVERSED)
def test_right_kernels_are_right_in_any_order(mutants: ModuleType, name: str) -> None:
    x = values(TOKENS, 1)
    for seed in range(50):
        np.testing.assert_array_equal(mutants.right(name, x, seed), right(name, x), err_msg=f"seed {seed}")


@pytest.mark.parametrize("name", REVERSED)
def test_mutants_are_wrong_in_some_order(mutants: ModuleType, name: str) -> None:
    x = values(TOKENS, 1)
    assert any((mutants.mutant(name, x, seed) != right(name, x)).any() for seed in SEEDS)


def test_the_same_seed_gives_the_same_order(mutants: ModuleType) -> None:
    x = values(TOKENS, 1)
    for seed in SEEDS:
        runs = [mutants.mutant("block_reverse", x, seed) for _ in range(2)]
        np.testing.assert_array_equal(*runs)
    orders = {mutants.mutant("counted_reverse", x, seed).tobytes() for seed in SEEDS}
    assert len(orders) == len(SEEDS)


# ---- mistakes that are errors

FAILING = {
    "barrier_in_a_branch": "(waits at|after thread .* has ended)",
    "barriers_at_two_places": "__syncthreads at .* while thread .* is at that of",
    "lanes_that_have_ended": "(of the mask has ended|thread ends while thread .* waits for it at a warp collective of)",
    "mask_without_its_caller": "the mask leaves out the calling lane",
    "collectives_at_two_places": "while thread .* is at another, of",
    "different_masks": "the mask leaves out|is at another, of",
    "barrier_against_collective": "no thread can go on: .*124 threads wait at a warp collective of",
    "one_block_too_few": "threads spin for ever",
    "blocks_that_are_not_alive": "threads spin for ever",
    "copy_to_global_memory": "asynchronous copy at .* to what is not shared memory",
    "copy_past_the_end": "asynchronous copy at .* to what is not shared memory",
    "copy_off_alignment": "asynchronous copy at .* not aligned to 16 bytes",
}


@pytest.mark.parametrize("name", FAILING)
def test_errors_say_what_and_where(mutants: ModuleType, name: str) -> None:
    lines = [n for n, line in enumerate(MUTANTS.read_text().splitlines(), 1) if line.endswith(f"// {name}")]
    for seed in SEEDS:
        with pytest.raises(RuntimeError, match=FAILING[name]) as caught:
            mutants.mutant(name, values(TOKENS), seed)
        message = str(caught.value)
        assert any(f"mutants.cpp:{line}" in message for line in lines), message
    np.testing.assert_array_equal(mutants.right("grid_reverse", values(TOKENS), 0), values(TOKENS)[::-1])


@pytest.mark.parametrize(
    ("launch", "message"),
    [
        (((0, 1, 1), 32, 0, False, 1), "no blocks"),
        (((1, 65536, 1), 32, 0, False, 1), "no blocks, or too many"),
        (((1, 1, 1), 0, 0, False, 1), "no whole warps"),
        (((1, 1, 1), 33, 0, False, 1), "no whole warps"),
        (((1, 1, 1), 1056, 0, False, 1), "no whole warps, or too many"),
        (((1, 1, 1), 32, (99 << 10) + 1, False, 1), "too much shared memory"),
        (((1, 3, 1), 32, 0, True, 2), "more blocks than the device holds"),
    ],
)
def test_launches_that_a_gpu_refuses(mutants: ModuleType, launch: tuple[object, ...], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        mutants.launch(*launch)


# ---- mistakes that AddressSanitizer stops: tests/sanitized.py runs all kernels under it

OUT_OF_BOUNDS = {
    "past_the_end_of_shared_memory": "heap-buffer-overflow",
    "past_the_end_of_a_workspace": "heap-buffer-overflow",
    "past_the_end_of_an_array": "stack-buffer-overflow",
}


@pytest.mark.slow
@pytest.mark.skipif(sanitized.missing() is not None, reason=str(sanitized.missing()))
def test_address_sanitizer(tmp_path: Path) -> None:
    sanitized.build([sanitized.SOURCES / "module.cpp", MUTANTS], tmp_path)
    begin = f"import numpy, flashprune._emulation as e; x = numpy.ones({TOKENS}, numpy.int32)\n"
    kernels = "".join(f"e.mutants.right({name!r}, x, 0)\n" for name in REVERSED)
    error = "try: e.mutants.mutant('barrier_in_a_branch', x, 0)\nexcept RuntimeError: print('stopped')\n"
    right = sanitized.run(tmp_path, begin + kernels + error + kernels, capture_output=True, text=True)
    assert (right.returncode, right.stdout, right.stderr) == (0, "stopped\n", "")
    for name, mistake in OUT_OF_BOUNDS.items():
        wrong = sanitized.run(tmp_path, begin + f"e.mutants.mutant({name!r}, x, 0)", capture_output=True, text=True)
        assert wrong.returncode != 0
        assert mistake in wrong.stderr
        assert re.search(rf"#0 .* in {name} .*mutants.cpp:\d+", wrong.stderr)
