"""These tests run in the environment that `environment.py` makes, apart from the project's own."""

import importlib.machinery
import os
import sys
import types
from collections.abc import Iterator, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.util import find_spec
from unittest.mock import MagicMock

import pytest

collect_ignore_glob = [] if find_spec("vllm") and find_spec("sglang") else ["test_*.py"]

os.environ["CUDA_VISIBLE_DEVICES"] = ""


class NoTorchvision(MetaPathFinder, Loader):
    """A torchvision of which nothing is called: both engines' models import it, and a CPU's torch has no use for it."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name.split(".")[0] != "torchvision":
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        module = MagicMock(name=spec.name, __spec__=spec, __path__=[])
        module.__name__ = spec.name
        return module

    def exec_module(self, module: types.ModuleType) -> None:
        pass


def stand_in_for_torchvision() -> None:
    """After Transformers has looked for torchvision, which it then takes to be missing."""
    from transformers.utils import is_torchvision_available

    if not is_torchvision_available():
        sys.meta_path.append(NoTorchvision())


if not collect_ignore_glob:
    stand_in_for_torchvision()


@pytest.fixture(autouse=True)
def settings(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """No setting but those of the test."""
    for name in list(os.environ):
        if name.startswith("FLASHPRUNE_"):
            monkeypatch.delenv(name)
    yield monkeypatch
