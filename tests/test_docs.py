"""The Python in the documentation runs as it stands there; each page by itself."""

import re
from pathlib import Path

import pytest

pytest.importorskip("transformers", minversion="5.19")

from flashprune.integrations.transformers import families

DOCS = Path(__file__).parent.parent / "docs"
PAGES = ("index.md", "extending.md", "guide/engines.md", "guide/research.md", "guide/serving.md")


@pytest.mark.parametrize("page", PAGES)
def test_examples(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(families, "_families", list(families._families))
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), re.DOTALL)
    assert blocks
    names: dict[str, object] = {"__name__": page}
    for block in blocks:
        exec(compile(block, str(DOCS / page), "exec"), names)
