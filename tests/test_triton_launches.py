"""What Triton compiles while a server runs: counts change from call to call, the forms of the kernels do not."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

pytest.importorskip("triton")

from tests.triton_launches import Launches

from flashprune import triton_ops

CALLS = 200


@pytest.fixture(scope="module")
def launches() -> Iterator[Launches]:
    process = Launches()
    yield process
    process.close()


@pytest.mark.parametrize("op", sorted(triton_ops.KERNELS))
def test_ragged_shapes_compile_no_more_than_the_configurations(op: str, launches: Launches) -> None:
    """A form is a configuration, or one of its layouts: a packed one, one with a prior."""
    found = launches.ask("served", op, CALLS)
    for kernel, forms in found["forms"].items():
        assert len({str(form) for form in forms}) == len(forms), f"{kernel} is compiled anew for a count: {forms}"
        tiles = {str({name: x for name, x in form.items() if type(x) is not bool}) for form in forms}
        assert len(tiles) <= found["configurations"], f"{kernel}: {tiles}"
