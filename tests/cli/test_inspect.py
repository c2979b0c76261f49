"""``driftscope inspect``: what is shown of one model, and in what two differ."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any
from unittest.mock import patch

import gguf
import pytest
from jsonschema import Draft202012Validator
from tests.workflow.case import BYTES, VOCAB, add_keys, tiny_model_tensors, write_model

from driftscope import cli
from driftscope.artifacts.derive.teacher import write_teacher
from driftscope.artifacts.open import open_artifact
from driftscope.report import diff_words

SCHEMA = Path(diff_words.__file__).with_name("inspect.schema.json")
TEMPLATE = (
    "{% if messages[0].role != 'system' %}{{ '<|end|>system\\nBe brief.<|end|>' }}{% endif %}"
    "{% for m in messages %}{{ '<|end|>' + m.role + '\\n' + m.content + '<|end|>' }}{% endfor %}"
)


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run ``driftscope inspect`` in this process."""
    out, err = io.StringIO(), io.StringIO()
    command = ["driftscope", "inspect", *map(str, arguments)]
    with (
        patch.object(sys, "argv", command),
        patch.dict(os.environ, COLUMNS="80"),
        redirect_stdout(out),
        redirect_stderr(err),
        pytest.raises(SystemExit) as ended,
    ):
        cli.main()
    return subprocess.CompletedProcess(command, int(ended.value.code or 0), out.getvalue(), err.getvalue())


def keys(**changes: Any) -> Callable[[gguf.GGUFWriter], None]:
    """The tiny model's keys, some of them changed or added."""

    def add(writer: gguf.GGUFWriter) -> None:
        add_keys(writer)
        writer.add_chat_template(TEMPLATE)
        for key, value in changes.items():
            kind = gguf.GGUFValueType.get_type(value)
            writer.kv_data[0][key.replace("__", ".")] = gguf.GGUFValue(value=value, type=kind)

    return add


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model and others with one thing changed."""
    folder = tmp_path_factory.mktemp("models")
    tensors = tiny_model_tensors()
    changed: dict[str, dict[str, Any]] = {
        "model": {},
        "label": {"general__name": "another name", "general__file_type": 0},
        "theta": {"llama__rope__freq_base": 1000000.0},
        "eos": {"tokenizer__ggml__eos_token_id": BYTES + 1},
        "template": {"tokenizer__chat_template": TEMPLATE.replace("Be brief", "Be exact")},
        "odd": {"llama__attention__layer_norm_rms_epsilon": 1e-12},
    }
    found = {
        name: write_model(folder / f"{name}.gguf", tensors, keys=keys(**change))
        for name, change in changed.items()
    }
    write_teacher(open_artifact(found["model"]), folder / "folder")
    return {**found, "folder": folder / "folder"}


def test_the_document(models: dict[str, Path]) -> None:
    done = run(models["model"], "--json")
    assert (done.returncode, done.stderr) == (0, "")
    document = json.loads(done.stdout, parse_constant=pytest.fail)
    Draft202012Validator(json.loads(SCHEMA.read_text("utf-8"))).validate(document)
    assert document["parameters"] == sum(values.size for values in tiny_model_tensors().values())
    assert document["tokenizer"]["tokens"] == VOCAB
    assert document["tokenizer"]["special"]["bos_token"] == {"id": BYTES, "text": "<|end|>"}
    assert document["chat_template"]["system"] == "added"
    assert [item["check"] for item in document["oddities"]] == ["bos-is-eos"]


def test_what_a_person_reads(models: dict[str, Path]) -> None:
    out = run(models["model"]).stdout
    assert re.search(r"^llama, [\d,]+ parameters in 21 tensors, .*, gguf$", out, re.MULTILINE)
    assert re.search(r"F32 +█{24} 100\.0 %", out)
    assert "byte-level BPE (gpt2), pre-tokenizer smollm, 259 tokens" in out
    assert "adds one of its own" in out
    assert "bos_token, eos_token: both are 256" in out


def test_a_folder_says_the_same_as_the_file_it_was_made_of(models: dict[str, Path]) -> None:
    done = run(models["model"], models["folder"])
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-1] == "✓ The same metadata, but for labels."


def test_an_odd_value_is_named_and_the_exit_code_is_0(models: dict[str, Path]) -> None:
    done = run(models["odd"])
    assert done.returncode == 0
    assert "! rms_norm_eps: 1e-12" in done.stdout


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ("theta", r"rope_theta +10000 → 1e\+06 +\(forward pass\)"),
        ("eos", r"eos_token +256 '<\|end\|>' → 257 'th'"),
        ("template", r"(?s)-.*Be brief.*\+.*Be exact"),
    ],
)
def test_two_that_differ(models: dict[str, Path], other: str, said: str) -> None:
    done = run(models["model"], models[other])
    assert (done.returncode, done.stderr) == (1, "")
    assert re.search(said, done.stdout)
    assert done.stdout.splitlines()[-1].startswith("✗ The metadata differ: ")
    document = json.loads(run(models["model"], models[other], "--json").stdout)
    assert document["same"] is False


def test_labels_are_listed_and_do_not_count(models: dict[str, Path]) -> None:
    done = run(models["label"], models["model"])
    assert done.returncode == 0
    assert "only in A: general.file_type, general.name" in done.stdout


def test_a_model_without_a_tokenizer(models: dict[str, Path], tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(models["folder"], bare)
    for file in bare.iterdir():
        if file.name.startswith(("tokenizer", "chat_template")):
            file.unlink()
    document = json.loads(run(bare, "--json").stdout)
    assert document["tokenizer"]["kind"] is None
    assert "tokenizer" in [item["check"] for item in document["oddities"]]


def test_names_of_a_file_cannot_move_the_cursor(tmp_path: Path) -> None:
    tensors = {**tiny_model_tensors(), "evil\x1b[2J": tiny_model_tensors()["output_norm.weight"]}
    path = write_model(tmp_path / "evil.gguf", tensors)
    done = run(path)
    assert done.returncode == 0
    assert "\x1b" not in done.stdout
    assert "evil" in done.stdout


@pytest.mark.parametrize("arguments", [("none.gguf",), ("none.gguf", "none.gguf")])
def test_bad_input(arguments: tuple[str, ...]) -> None:
    done = run(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
