"""The benchmark of whole models, tried with tiny ones; and the real ones' inputs."""

import pytest

pytest.importorskip("transformers", minversion="5.19")

from benchmarks import gpu_models
from examples import tiny_models
from PIL import Image


def test_prints_a_row_for_every_variant(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["gpu_models", "--tiny", "--runs", "1"])
    gpu_models.main()
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if " → " in line]
    assert len(rows) == 2 * (1 + 5 * len(gpu_models.KEEPS))
    for row in rows:
        before, kept = map(int, row[1].split(" → "))
        assert kept == before if row[0] == "| none" else kept in [round(before * keep) for keep in gpu_models.KEEPS]
        assert all(float(cell.split()[0]) > 0 for cell in (row[2], row[5]))


@pytest.mark.parametrize(("family", "tokens"), [("llava", 576), ("qwen2_5_vl", 2880)])
def test_the_images_fill_the_real_models_grids(family: str, tokens: int) -> None:
    tokenizer = tiny_models.make_tokenizer(family)
    config = tiny_models.make_config(family, "real", tokenizer)
    processor = tiny_models.make_processor(family, config, tokenizer)
    inputs = tiny_models.inputs(processor, [[Image.new("RGB", gpu_models.SIZES[family])]], ["Hello"])
    assert (inputs["input_ids"] == config.image_token_id).sum() == tokens
