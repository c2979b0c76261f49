"""The command line: help, JSON, and the exit codes 0 holds, 1 does not hold, 2 bad input."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import typer.main
from typer.testing import CliRunner

from driftscope import __version__, cli
from tests.workflow.case import tiny_model_tensors, write_model

RUNNER = CliRunner()
Q8_0 = gguf.GGMLQuantizationType.Q8_0


def commands() -> list[tuple[str, ...]]:
    """Every command, with the group it is in."""
    found: list[tuple[str, ...]] = []
    for name, command in typer.main.get_command(cli.app).commands.items():  # type: ignore[attr-defined]
        found += [(name, inner) for inner in getattr(command, "commands", {})] or [(name,)]
    return found


def driftscope(*arguments: str | Path) -> tuple[int, str, str]:
    """Run the program; exit code, stdout, stderr."""
    done = subprocess.run(
        [sys.executable, "-m", "driftscope.cli", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model, a copy, its Q8_0, another model, one with a NaN, one that is cut."""
    folder = tmp_path_factory.mktemp("models")
    tensors = tiny_model_tensors()
    matrices = {name: Q8_0 for name, values in tensors.items() if values.ndim == 2}
    broken = {name: values.copy() for name, values in tensors.items()}
    broken["blk.0.attn_k.weight"][1, 2] = np.nan
    swapped = {**tensors, "blk.0.ffn_up.weight": tensors["blk.1.ffn_up.weight"]}
    found = {
        "model": write_model(folder / "model.gguf", tensors),
        "copy": write_model(folder / "copy.gguf", tensors),
        "q8_0": write_model(folder / "q8_0.gguf", tensors, formats=matrices),
        "swapped": write_model(folder / "swapped.gguf", swapped),
        "nan": write_model(folder / "nan.gguf", broken),
        "cut": folder / "cut.gguf",
    }
    found["cut"].write_bytes(found["model"].read_bytes()[:5000])
    return found


@pytest.mark.parametrize("command", commands(), ids=" ".join)
def test_every_command_explains_itself(command: tuple[str, ...]) -> None:
    done = RUNNER.invoke(cli.app, [*command, "--help"])
    assert done.exit_code == 0
    text = done.output.split("Usage:", 1)[1]
    assert command[-1] in text
    # What it does, beside its usage and options.
    assert len(text.split("\n\n")) > 1


def test_the_version() -> None:
    assert RUNNER.invoke(cli.app, ["--version"]).output.strip() == __version__


def test_an_unknown_command_and_option_exit_with_2() -> None:
    assert RUNNER.invoke(cli.app, ["nonsense"]).exit_code == 2
    assert RUNNER.invoke(cli.app, ["diff", "--nonsense"]).exit_code == 2


def test_equal_models_do_not_differ(models: dict[str, Path]) -> None:
    code, out, err = driftscope("diff", models["model"], models["copy"], "--json")
    assert (code, err) == (0, "")
    document = json.loads(out)
    assert document["summary"]["holds"] is True
    assert {row["max_diff"] for row in document["tensors"]} == {0.0}


def test_a_quantized_model_holds_and_says_so(models: dict[str, Path]) -> None:
    code, out, _ = driftscope("diff", models["model"], models["q8_0"], "--json")
    assert code == 0
    relations = json.loads(out)["summary"]["relations"]
    assert relations["model.layers.0.self_attn.q_proj.weight"].startswith("quantized")
    code, out, _ = driftscope("diff", models["model"], models["q8_0"], "--limit", "3")
    assert code == 0
    assert "21 of 21 tensors" in out


@pytest.mark.parametrize(("other", "tensor"), [("swapped", "mlp.up_proj"), ("nan", "self_attn.k_proj")])
def test_a_model_that_differs_exits_with_1(models: dict[str, Path], other: str, tensor: str) -> None:
    code, out, _ = driftscope("diff", models["model"], models[other], "--json")
    assert code == 1
    document = json.loads(out)
    assert document["summary"]["holds"] is False
    odd = document["tensors"]
    bad = [row["tensor"] for row in odd if row["max_diff"] or row["nan_b"]]
    assert bad == [f"model.layers.0.{tensor}.weight"]
    assert driftscope("diff", models["model"], models[other])[0] == 1


@pytest.mark.parametrize("command", ["diff", "inspect"])
def test_a_cut_model_is_one_line_and_exits_with_2(models: dict[str, Path], command: str) -> None:
    others = [models["model"]] if command == "diff" else []
    code, out, err = driftscope(command, *others, models["cut"])
    assert (code, out) == (2, "")
    assert err.startswith("driftscope: ")
    assert err.count("\n") == 1
    assert "cut.gguf" in err


def test_a_model_is_described(models: dict[str, Path]) -> None:
    code, out, _ = driftscope("inspect", models["q8_0"], "--json")
    assert code == 0
    document = json.loads(out)
    assert (document["container"], document["config"]["architecture"]) == ("gguf", "llama")
    assert set(document["dtypes"]) == {"Q8_0", "F32"}
    assert "llama" in driftscope("inspect", models["q8_0"])[1]


_SWEEP = ("--teacher", "a", "--candidate", "b", "--out", "c", "--blocks", "d")
_DIVERGENCE = ("--teacher", "t", "--part", "0/1", "--out", "c")


@pytest.mark.parametrize(
    "arguments",
    [
        ("report", "none.json"),
        ("gate", "none.json"),
        ("inspect", "none.gguf"),
        ("lock", "none.yaml"),
        ("run", "--config", "none.yaml"),
        ("contracts", "validate", "none"),
        ("stage", "sweep", *_SWEEP, "--part", "4/4"),
        ("stage", "sweep", *_SWEEP, "--part", "x"),
        ("stage", "divergence", *_DIVERGENCE, "--trace", "no-label", "--pair", "a|b"),
        ("stage", "divergence", *_DIVERGENCE, "--trace", "a=b", "--pair", "ab"),
    ],
    ids=" ".join,
)
def test_bad_input_is_one_line_and_exits_with_2(arguments: tuple[str, ...]) -> None:
    code, out, err = driftscope(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith("driftscope: ")
    assert err.count("\n") == 1


def test_a_json_file_that_is_no_report_is_refused(tmp_path: Path) -> None:
    (tmp_path / "r.json").write_text('{"gates": []}', encoding="utf-8")
    for command in ("report", "gate"):
        code, _, err = driftscope(command, tmp_path / "r.json")
        assert code == 2
        assert "r.json" in err


def test_contracts_are_validated() -> None:
    folder = Path(__file__).parents[1] / "contracts"
    code, out, _ = driftscope("contracts", "validate", folder, "--json")
    assert code == 0
    assert {"token-scope", "chain", "one-block"} <= {row["id"] for row in json.loads(out)}


def test_lint_exits_with_1_where_a_claim_has_no_backing(tmp_path: Path) -> None:
    folder = Path(__file__).parents[1] / "contracts"
    code, out, _ = driftscope("contracts", "lint", folder / "chain.yaml")
    assert code == 0
    assert "not checked: " in out
    text = (folder / "chain.yaml").read_text(encoding="utf-8")
    (tmp_path / "chain.yaml").write_text(
        text.replace("falsifiers: [chain-superlinear]", ""), encoding="utf-8"
    )
    code, out, _ = driftscope("contracts", "lint", tmp_path / "chain.yaml")
    assert code == 1
    assert "unbound-obligation" in out
    code, _, err = driftscope("contracts", "discharge", tmp_path / "chain.yaml", "--results", tmp_path)
    assert code == 1
    assert "was not measured" in err
    code, _, err = driftscope("contracts", "explain", "no-such-thing", "--contracts", folder)
    assert code == 2
    assert "no-such-thing" in err


def test_nothing_heavy_is_imported_before_it_is_needed() -> None:
    heavy = {"numba", "polars", "pandera", "altair", "huggingface_hub", "snakemake", "tokenizers", "torch"}
    program = f"import sys, driftscope.cli; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
