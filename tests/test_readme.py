"""The README's Python runs as it stands there."""

import re
from pathlib import Path

import pytest

pytest.importorskip("transformers", minversion="5.19")

from examples import tiny_models

README = Path(__file__).parent.parent / "README.md"


def test_examples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "python examples/tiny_models.py llava tiny-llava" in README.read_text()
    tiny_models.save("llava", tmp_path / "tiny-llava")
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(blocks) == 2
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, str(README), "exec"), names)
    assert names["features"].shape == (144, 4096)  # type: ignore[attr-defined]
    last = names["handle"].last  # type: ignore[attr-defined]
    assert last.counts == [(64, 16)] and last.kept[0].shape == (16,)
