"""``driftscope diff``: what holds, what does not, by which bound, and what a terminal or a program gets."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any
from unittest.mock import patch

import gguf
import numpy as np
import pytest
from jsonschema import Draft202012Validator
from tests.workflow.case import add_keys, tiny_model_tensors, write_model

from driftscope import cli
from driftscope.report import diff_words

Q8_0, Q4_0 = gguf.GGMLQuantizationType.Q8_0, gguf.GGMLQuantizationType.Q4_0
SCHEMA = Path(diff_words.__file__).with_name("diff.schema.json")
N_TENSORS = 21


def run(*arguments: str | Path, columns: int = 80) -> subprocess.CompletedProcess[str]:
    """Run ``driftscope diff`` in this process."""
    out, err = io.StringIO(), io.StringIO()
    command = ["driftscope", "diff", *map(str, arguments)]
    with (
        patch.object(sys, "argv", command),
        patch.dict(os.environ, COLUMNS=str(columns)),
        redirect_stdout(out),
        redirect_stderr(err),
        pytest.raises(SystemExit) as ended,
    ):
        cli.main()
    return subprocess.CompletedProcess(command, int(ended.value.code or 0), out.getvalue(), err.getvalue())


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model and others made of it."""
    folder = tmp_path_factory.mktemp("models")
    tensors = tiny_model_tensors()
    matrices = {name: Q8_0 for name, values in tensors.items() if values.ndim == 2}

    def changed(name: str, values: Any) -> dict[str, Any]:
        return {**tensors, name: np.asarray(values, np.float32)}

    up, norm = "blk.0.ffn_up.weight", "blk.1.attn_norm.weight"
    broken = tensors[norm].copy()
    broken[7] = np.nan
    nudged = tensors[up].copy()
    nudged[3, 5] += 0.25

    def other_eps(writer: gguf.GGUFWriter) -> None:
        add_keys(writer)
        writer.kv_data[0]["llama.attention.layer_norm_rms_epsilon"].value = 1e-6

    return {
        "model": write_model(folder / "model.gguf", tensors),
        "copy": write_model(folder / "copy.gguf", tensors),
        "q8_0": write_model(folder / "q8_0.gguf", tensors, formats=matrices),
        "q4_0": write_model(folder / "q4_0.gguf", tensors, formats=dict.fromkeys(matrices, Q4_0)),
        "nudged": write_model(folder / "nudged.gguf", changed(up, nudged)),
        "nan": write_model(folder / "nan.gguf", changed(norm, broken)),
        "lacking": write_model(folder / "lacking.gguf", {k: v for k, v in tensors.items() if k != up}),
        "eps": write_model(folder / "eps.gguf", tensors, keys=other_eps),
        "other": write_model(folder / "other.gguf", tiny_model_tensors(1)),
    }


@pytest.mark.parametrize(
    ("other", "code", "conclusion"),
    [
        ("copy", 0, "identical"),
        ("q8_0", 0, "quantized-from"),
        ("nudged", 1, "different"),
        ("nan", 1, "non-finite"),
        ("lacking", 1, "incomplete"),
        ("eps", 1, "identical"),
    ],
)
def test_the_exit_code_and_the_document(
    models: dict[str, Path], other: str, code: int, conclusion: str
) -> None:
    done = run(models["model"], models[other], "--json")
    assert (done.returncode, done.stderr) == (code, "")
    document = json.loads(done.stdout, parse_constant=pytest.fail)
    Draft202012Validator(json.loads(SCHEMA.read_text("utf-8"))).validate(document)
    assert document["holds"] is (code == 0)
    assert document["summary"]["conclusion"] == conclusion


def test_another_training_does_not_hold(models: dict[str, Path]) -> None:
    done = run(models["model"], models["other"])
    assert done.returncode == 1
    assert re.fullmatch(r"✗ Different weights: .* nothing in common .*\.", done.stdout.splitlines()[-1])


def test_the_worst_come_first(models: dict[str, Path]) -> None:
    document = json.loads(run(models["q8_0"], models["nudged"], "--json").stdout)
    holds = [row["holds"] for row in document["tensors"]]
    assert holds == sorted(holds)
    document = json.loads(run(models["model"], models["q8_0"], "--json").stdout)
    ratios = [row["nmse_over_expected"] for row in document["tensors"] if row["kind"] == "quantized-from"]
    assert ratios == sorted(ratios, reverse=True)


def test_a_change_of_the_forward_pass_is_named(models: dict[str, Path]) -> None:
    done = run(models["model"], models["eps"])
    assert done.returncode == 1
    assert "rms_norm_eps" in done.stdout.splitlines()[-1]


def test_a_table_fits_eighty_columns_and_names_each_tensor_in_short(models: dict[str, Path]) -> None:
    done = run(models["model"], models["q8_0"], "--limit", "21")
    table = [line for line in done.stdout.splitlines() if "Q8_0" in line and line.startswith("  ")]
    assert len(table) == 16
    assert max(map(len, done.stdout.splitlines()[:17])) <= 80
    assert any(re.match(r"  L1 mlp\.down_proj +F32→Q8_0 +quantized-from ", line) for line in table)
    wide = run(models["model"], models["q8_0"], columns=160).stdout
    assert "std ratio" in wide
    assert "model.layers.1.mlp.down_proj.weight" in wide


def test_the_limit_is_of_the_table_alone(models: dict[str, Path]) -> None:
    done = run(models["model"], models["q8_0"], "--limit", "2")
    assert sum("Q8_0" in line for line in done.stdout.splitlines()) == 2
    assert "14 more" in done.stdout
    assert "21 of 21 tensors" in done.stdout
    assert "quantized-from" in run(models["model"], models["q8_0"], "--limit", "0").stdout


class TestOnly:
    def test_by_the_canonical_and_by_the_stored_name(self, models: dict[str, Path]) -> None:
        for pattern in (r"mlp\.up_proj", r"ffn_up"):
            document = json.loads(run(models["model"], models["nudged"], "--json", "--only", pattern).stdout)
            assert [row["tensor"].split(".")[-2] for row in document["tensors"]] == ["up_proj"] * 2
            assert document["holds"] is False
            share = document["summary"]["share"]
            assert (share["tensors"], share["tensors_in_all"]) == (2, N_TENSORS)
            assert share["bytes"] < share["bytes_in_all"]

    def test_what_was_left_out_is_said_and_not_judged(self, models: dict[str, Path]) -> None:
        done = run(models["model"], models["nudged"], "--only", "attn")
        assert done.returncode == 0
        assert re.search(r"--only +\d+ of 21 tensors, .* % ?\); the others were not looked at", done.stdout)

    def test_a_missing_tensor_that_it_matches(self, models: dict[str, Path]) -> None:
        assert run(models["model"], models["lacking"], "--only", "ffn_up").returncode == 1
        assert run(models["model"], models["lacking"], "--only", r"layers\.1").returncode == 0

    def test_nothing_matched(self, models: dict[str, Path]) -> None:
        done = run(models["model"], models["copy"], "--only", "no such name")
        assert (done.returncode, done.stdout) == (2, "")
        assert re.fullmatch(
            r"driftscope: --only 'no such name': matches no name of 21 tensors\n", done.stderr
        )


class TestThreshold:
    def test_it_takes_the_place_of_the_relation(self, models: dict[str, Path]) -> None:
        # One value of 65,536 is off by a quarter: not the error of any format, but a small one.
        assert run(models["model"], models["nudged"]).returncode == 1
        loose = run(models["model"], models["nudged"], "--threshold", r"0\.mlp\.up_proj nmse<1e-2")
        assert loose.returncode == 0
        strict = run(models["model"], models["nudged"], "--threshold", r"0\.mlp\.up_proj nmse<1e-9")
        assert strict.returncode == 1
        assert "broken by 1 of 1 tensor" in strict.stdout

    def test_tensors_that_it_does_not_match_are_judged_as_before(self, models: dict[str, Path]) -> None:
        done = run(models["model"], models["nudged"], "--threshold", "attn_q nmse<1")
        assert done.returncode == 1

    def test_every_one_must_hold(self, models: dict[str, Path]) -> None:
        bounds = [
            "--threshold",
            ".* cosine_similarity>0.999",
            "--threshold",
            "blk nmse_over_expected <= 1e-3",
        ]
        document = json.loads(run(models["model"], models["q8_0"], "--json", *bounds).stdout)
        first, second = document["thresholds"]
        assert (len(first["matched"]), first["broken"]) == (N_TENSORS, [])
        assert second["broken"]
        assert document["holds"] is False

    def test_none_lets_a_nan_pass(self, models: dict[str, Path]) -> None:
        assert run(models["model"], models["nan"], "--threshold", ".* nmse<1").returncode == 1

    def test_none_makes_up_for_a_missing_tensor(self, models: dict[str, Path]) -> None:
        assert run(models["model"], models["lacking"], "--threshold", ".* nmse<1").returncode == 1

    @pytest.mark.parametrize(
        ("text", "said"),
        [
            ("nothing_like_it nmse<1", "matches no name of 21 compared tensors"),
            ("mlp nsme<1", "unknown metric 'nsme'; expected one of nmse, nmse_over_expected, "),
            ("mlp nmse", "expected 'REGEX METRIC<VALUE'"),
            ("mlp nmse<small", "'small' is not a number"),
            ("mlp nmse<nan", "'nan' is not a number"),
            ("mlp( nmse<1", "is not a regular expression"),
        ],
    )
    def test_one_that_cannot_be_used_is_named(self, models: dict[str, Path], text: str, said: str) -> None:
        done = run(models["model"], models["copy"], "--threshold", text)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith("driftscope: --threshold")
        assert said in done.stderr
        assert done.stderr.count("\n") == 1


class TestPage:
    def test_it_is_written_beside_the_table(self, models: dict[str, Path], tmp_path: Path) -> None:
        page = tmp_path / "diff.html"
        done = run(models["model"], models["nudged"], "--html", page)
        assert done.returncode == 1
        assert str(page) in done.stdout
        assert "mlp.up_proj" in page.read_text("utf-8")

    @pytest.mark.parametrize("place", [".", "none/diff.html"])
    def test_a_place_that_cannot_be_written_is_refused_first(
        self, models: dict[str, Path], tmp_path: Path, place: str
    ) -> None:
        done = run(models["model"], models["copy"], "--html", tmp_path / place)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith("driftscope: --html ")


class TestEnding:
    def test_a_reader_that_goes_away(self, models: dict[str, Path]) -> None:
        files = (str(models["model"]), str(models["q8_0"]))
        command = [sys.executable, "-m", "driftscope.cli", "diff", *files, "--json"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            assert process.stdout is not None
            assert process.stderr is not None
            process.stdout.close()
            assert process.stderr.read() == b""
        assert process.returncode == -signal.SIGPIPE

    def test_an_interrupt(self, models: dict[str, Path]) -> None:
        # Reading a pipe that nobody writes to takes as long as one likes: the interrupt comes in between.
        code = (
            "import sys, time; from driftscope.analysis.weights import pair_diff; "
            "pair_diff.diff_models = lambda *a, **k: (print('ready', flush=True), time.sleep(60)); "
            f"sys.argv = ['driftscope', 'diff', {str(models['model'])!r}, {str(models['copy'])!r}]; "
            "from driftscope.cli import main; main()"
        )
        with subprocess.Popen(
            [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as process:
            assert process.stdout is not None
            assert process.stderr is not None
            assert process.stdout.readline() == "ready\n"
            time.sleep(0.2)
            process.send_signal(signal.SIGINT)
            assert process.stderr.read() == "driftscope: interrupted\n"
        assert process.returncode == 130

    def test_progress_is_for_terminals(self, models: dict[str, Path]) -> None:
        main, terminal = pty.openpty()
        with subprocess.Popen(
            [sys.executable, "-m", "driftscope.cli", "diff", str(models["model"]), str(models["q8_0"])],
            stdout=subprocess.PIPE,
            stderr=terminal,
            env={**os.environ, "TERM": "xterm", "COLUMNS": "80"},
        ) as process:
            os.close(terminal)
            assert process.stdout is not None
            out = process.stdout.read()
        shown = os.read(main, 1 << 16)
        os.close(main)
        assert b"comparing" in shown
        assert b"\x1b" not in out


def test_one_flipped_bit_is_found_in_a_tensor_whose_error_is_that_of_its_format(
    models: dict[str, Path], tmp_path: Path
) -> None:
    flipped = tmp_path / "flipped.gguf"
    flipped.write_bytes(models["q8_0"].read_bytes())
    (tensor,) = [t for t in gguf.GGUFReader(models["q8_0"]).tensors if t.name == "blk.1.ffn_gate.weight"]
    with flipped.open("r+b") as stream:
        # Block 100, of 34 bytes: its scale is an f16, whose high byte holds the exponent from bit 2 on.
        stream.seek(int(tensor.data_offset) + 34 * 100 + 1)
        (byte,) = stream.read(1)
        stream.seek(-1, os.SEEK_CUR)
        stream.write(bytes([byte ^ 0x04]))
    done = run(models["model"], flipped)
    assert done.returncode == 1
    assert done.stdout.splitlines()[-1] == "✗ L1 mlp.gate_proj holds a flipped bit."
    assert re.search(r"blocks +L1 mlp\.gate_proj, row 12, columns 128 to 159: bit 2 of byte 1", done.stdout)
    assert run(models["model"], flipped, "--threshold", ".* nmse<1").returncode == 1


def test_a_json_file_that_is_no_manifest_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text('{"model_type": "llama"}')
    ran = run(file, file)
    assert (ran.returncode, ran.stdout) == (2, "")
    assert "is no manifest of a model" in ran.stderr


def test_what_only_b_has_is_said(models: dict[str, Path]) -> None:
    found = run(models["lacking"], models["model"])
    assert found.returncode == 0
    said = " ".join(found.stdout.split())
    assert f"All {N_TENSORS - 1} tensors have the same values. B has 1 tensor that A has not." in said
