"""`flashprune validate` must pass on sound operators and fail, naming the case, on any broken one."""

from __future__ import annotations

import re

import pytest
import torch
from typer.testing import CliRunner

import flashprune as fp
from flashprune import dispatch, operators, triton_ops
from flashprune.cli import app, cases, validate
from flashprune.cli.console import InputError


@pytest.fixture
def one_dtype(monkeypatch) -> None:
    """Enough to find what is broken, in a third of the time."""
    monkeypatch.setattr(validate, "DTYPES", (torch.float32,))


def run(*arguments: object):
    return CliRunner().invoke(app, ["validate", *(str(argument) for argument in arguments)])


def quick(op: str, *more: str):
    return run("--quick", "--backend", "reference", "--only", op, *more)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("op", cases.OPERATORS)
def test_sound_operators_pass(op: str, backend: str) -> None:
    if fp.backends()[backend] != "ready":
        pytest.skip(f"{backend}: {fp.backends()[backend]}")
    result = run("--quick", "--backend", backend, "--only", op)
    assert result.exit_code == 0, result.output
    rows = [line.split() for line in result.stdout.splitlines() if line.strip().startswith(op)]
    assert [(row[1], row[2], row[4]) for row in rows] == [
        (backend, dtype, "0") for dtype in ("float32", "float16", "bfloat16")
    ]
    assert "cases passed" in result.stdout


def test_output_is_plain() -> None:
    text = run("--quick", "--only", "topk").stdout
    assert all(line.isprintable() and len(line) <= 80 for line in text.splitlines()) and "…" not in text


def swap_last_for_unpicked(picks: torch.Tensor, n: int) -> torch.Tensor:
    """The picks with the last one replaced by some token that was not chosen."""
    chosen = set(picks.tolist())
    spare = [token for token in range(n) if token not in chosen]
    return torch.cat([picks[:-1], torch.tensor(spare[-1:])]) if spare and len(picks) else picks


@pytest.mark.usefixtures("one_dtype")
@pytest.mark.parametrize("op", cases.SELECTORS)
def test_wrong_pick_is_found(op: str, monkeypatch) -> None:
    """One wrong token in a selection that is otherwise sound, on plain [N, D] input only."""
    sound = getattr(fp, f"{op}_select")

    def broken(first: torch.Tensor, *rest: object, **options: object) -> torch.Tensor:
        picks = sound(first, *rest, **options)
        plain = picks.ndim == 1 and options.get("cu_seqlens") is None
        return swap_last_for_unpicked(picks, first.shape[0]) if plain else picks

    monkeypatch.setattr(fp, f"{op}_select", broken)
    result = quick(op)
    assert result.exit_code == 1
    assert re.search(rf"FAILED {op}:\d+ reference float32: .*N=\d+ k=\d+", result.stdout), result.stdout


@pytest.mark.usefixtures("one_dtype")
@pytest.mark.parametrize("op", cases.VIDEO)
def test_wrong_token_of_a_video_is_found(op: str, monkeypatch) -> None:
    sound = getattr(fp, f"{op}_select")

    def broken(features: torch.Tensor, **options: object) -> torch.Tensor:
        return swap_last_for_unpicked(sound(features, **options), len(features))

    monkeypatch.setattr(fp, f"{op}_select", broken)
    result = quick(op)
    assert result.exit_code == 1
    assert re.search(rf"FAILED {op}:\d+ reference float32: .*thw=2x5x7 D=\d+ q=0.75: ", result.stdout), result.stdout


@pytest.mark.usefixtures("one_dtype")
@pytest.mark.parametrize("op", cases.SELECTORS)
def test_wrong_tie_rule_is_found(op: str, monkeypatch) -> None:
    """A selector that prefers the higher index among equals."""
    sound = getattr(fp, f"{op}_select")

    def broken(first: torch.Tensor, *rest: torch.Tensor, **options: object) -> torch.Tensor:
        if options.get("cu_seqlens") is not None:
            return sound(first, *rest, **options)
        axis = first.ndim - (1 if op == "topk" else 2)
        tensors = [x.flip(axis) for x in (first, *rest)]
        if "positions" in options:
            options["positions"] = options["positions"].flip(axis)
        return first.shape[axis] - 1 - sound(*tensors, **options)

    monkeypatch.setattr(fp, f"{op}_select", broken)
    assert quick(op).exit_code == 1


@pytest.mark.usefixtures("one_dtype")
@pytest.mark.parametrize("op", cases.ATTENTION)
def test_wrong_attention_is_found(op: str, monkeypatch) -> None:
    sound = getattr(fp, op)
    monkeypatch.setattr(fp, op, lambda *inputs, **options: sound(*inputs, **options) * 1.0001)
    result = quick(op)
    assert result.exit_code == 1
    assert f"FAILED {op}:0 reference float32: " in result.stdout and "of the largest" in result.stdout


@pytest.mark.usefixtures("one_dtype")
def test_an_exception_is_a_failure_of_its_case_alone(monkeypatch) -> None:
    sound = fp.topk_select

    def broken(scores: torch.Tensor, *rest: object, **options: object) -> torch.Tensor:
        if scores.shape == (33,):
            raise RuntimeError("kernel launch failed")
        return sound(scores, *rest, **options)

    monkeypatch.setattr(fp, "topk_select", broken)
    result = quick("topk")
    assert result.exit_code == 1
    assert result.stdout.count("RuntimeError: kernel launch failed") == 4
    assert "4 of 24 cases failed" in result.stdout


@pytest.mark.usefixtures("one_dtype")
def test_a_failure_can_be_run_again_from_its_line(monkeypatch) -> None:
    sound = fp.mmr_select
    monkeypatch.setattr(fp, "mmr_select", lambda *x, **options: sound(*x, **options).flip(-1))
    again = re.search(r"flashprune validate (--only mmr:\d+ .*)", quick("mmr", "--seed", "5").stdout)
    assert again is not None
    assert "--seed 5 --quick" in again[1]
    result = run(*again[1].split())
    assert result.exit_code == 1 and "1 of 1 cases failed" in result.stdout
    monkeypatch.undo()
    assert run(*again[1].split()).exit_code == 0


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (("--backend", "triton"), "--backend triton does not serve --device cpu"),
        (("--only", "sort"), "--only must be OP or OP:CASE"),
        (("--only", "mmr:x"), "--only must be OP or OP:CASE"),
        (("--only", "mmr:9999"), "mmr has the cases 0 to"),
        (("--quick", "--only", "topk", "--seed", str(2**63)), "--seed"),
    ],
)
def test_wrong_options(options: tuple[str, ...], complaint: str) -> None:
    result = run(*options)
    assert result.exit_code == 2
    assert complaint in result.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu() -> None:
    result = run("--device", "cuda")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == "flashprune: error: --device cuda: torch finds no GPU\n"


def test_cuda_checks_the_operators_that_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda")
    monkeypatch.setitem(dispatch._status, "cuda", "ready")
    monkeypatch.setitem(dispatch._status, "triton", "ready")
    monkeypatch.setattr(operators, "CUDA_KERNELS", frozenset({"topk_select"}))
    monkeypatch.setattr(triton_ops, "KERNELS", frozenset({"topk_select", "query_attention"}))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert validate._backends(gpu, None, "topk") == ["reference", "triton", "cuda"]
    assert validate._backends(gpu, "auto", "mis") == ["reference"]
    assert validate._backends(gpu, "cuda", "query_attention") == ["cuda"]
    with pytest.raises(InputError, match="--backend cuda: no CUDA kernel for mis_select yet"):
        validate._backends(gpu, "cuda", "mis")
    with pytest.raises(InputError, match="--backend cuda: received_attention is a Triton kernel there: no Triton"):
        validate._backends(gpu, "cuda", "received_attention")


@pytest.mark.parametrize("op", cases.OPERATORS)
def test_cases_depend_on_the_seed_alone(op: str) -> None:
    first, again, other = (list(cases.cases(op, seed, quick=True)) for seed in (3, 3, 4))
    assert [case.number for case in first] == list(range(len(first)))
    assert [case.text for case in first] == [case.text for case in again]
    pairs = [(x, y) for one, two in zip(first, again, strict=True) for x, y in zip(one.inputs, two.inputs, strict=True)]
    assert all(torch.equal(x.nan_to_num(7.0), y.nan_to_num(7.0)) for x, y in pairs)
    assert any(
        not torch.equal(x, y)
        for one, two in zip(first, other, strict=True)
        for x, y in zip(one.inputs, two.inputs, strict=True)
    )


@pytest.mark.parametrize("op", cases.SELECTORS)
def test_cases_cover_every_layout_and_exact_numbers(op: str) -> None:
    drawn = list(cases.cases(op, 0, quick=False))
    token_dims = 0 if op == "topk" else 1
    assert any(case.exact for case in drawn) and (op == "topk" or any(not case.exact for case in drawn))
    assert {case.inputs[0].ndim - token_dims for case in drawn} == {1, 2}
    assert any("cu_seqlens" in case.params for case in drawn)
    assert {0} <= {case.params["k"] for case in drawn if isinstance(case.params["k"], int)}
