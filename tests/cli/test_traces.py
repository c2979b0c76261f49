"""trace, compare and replay from the command line: what they print, and their exit codes."""

from __future__ import annotations

import json
import re
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
from tests.forward.models import write_model

from driftscope import cli
from driftscope.artifacts.derive.candidate import write_candidate
from driftscope.artifacts.open import open_artifact
from driftscope.engines import own
from driftscope.engines.trace import Trace
from driftscope.evidence.store import read_table
from driftscope.forward.arithmetic import Arithmetic
from driftscope.forward.model import ForwardPass

IDS = ("--ids", "5,9,200,7,7,41,300,2", "--ids", "3, 17 90")


class Runner:
    """Runs the program in this process."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        monkeypatch.setenv("COLUMNS", "80")
        self._monkeypatch = monkeypatch
        self._capsys = capsys

    def __call__(self, *arguments: str | Path) -> tuple[int, str, str]:
        """Exit code, stdout, stderr."""
        self._monkeypatch.setattr(sys, "argv", ["driftscope", *map(str, arguments)])
        self._capsys.readouterr()
        with pytest.raises(SystemExit) as found:
            cli.main()
        out, err = self._capsys.readouterr()
        return int(found.value.code or 0), out, err


@pytest.fixture
def driftscope(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Runner:
    return Runner(monkeypatch, capsys)


class Louder(ForwardPass):
    """Gate and up change places in the layer 1."""

    def project(self, layer: int, site: str, x: np.ndarray) -> np.ndarray:  # type: ignore[type-arg]
        other = {"gate": "up", "up": "gate"}.get(site, site)
        return super().project(layer, other if layer == 1 else site, x)


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model in float32 and in Q8_0, clean traces of it and a faulty one."""
    folder = tmp_path_factory.mktemp("traces")
    teacher = open_artifact(write_model(folder / "teacher", "qwen2", hidden_size=224))
    write_candidate(teacher, folder / "model.gguf", scheme="Q8_0")
    candidate = open_artifact(folder / "model.gguf")
    prompts = [("ids-1", [5, 9, 200, 7, 7, 41, 300, 2]), ("ids-2", [3, 17, 90])]
    arithmetic = Arithmetic.of("int8-dot", kv_type="f16")
    own.trace(candidate, prompts, folder / "clean", arithmetic)
    own.trace(candidate, prompts, folder / "f32", Arithmetic.of())
    faulty = Louder({"model": candidate}, arithmetic.policy)
    own.record(faulty, prompts, folder / "faulty", engine={"name": "port"}, declared=arithmetic)
    own.trace(candidate, [("ids-1", [1, 2])], folder / "other", arithmetic)
    return {path.name: path for path in folder.iterdir()}


@pytest.mark.parametrize(
    ("engine", "model", "options", "says"),
    [
        ("own", "teacher", (), "driftscope, f32"),
        ("own", "model.gguf", ("--path", "int8-dot", "--kv-type", "f16"), "int8-dot, keys and values f16"),
        ("own", "model.gguf", ("--activation", "bf16"), "f32, activations bf16"),
        ("llama.cpp", "model.gguf", ("--kv-type", "f32", "--no-repack"), "int8-dot"),
        (
            "llama.cpp",
            "model.gguf",
            ("--flash-attention",),
            "no attn_scores: flash attention keeps",
        ),
        ("transformers", "teacher", ("--dtype", "bf16", "--attention", "sdpa"), "bf16"),
    ],
)
def test_every_engine_writes_a_trace(
    engine: str,
    model: str,
    options: tuple[str, ...],
    says: str,
    paths: dict[str, Path],
    driftscope: Runner,
    tmp_path: Path,
) -> None:
    out = tmp_path / "trace"
    code, text, _ = driftscope("trace", paths[model], "--engine", engine, *options, *IDS, "--out", out)
    assert code == 0
    assert "11 tokens of 2 prompts" in text
    assert says in text
    trace = Trace(out)
    assert [ids for _, ids in trace.manifest.prompts] == [(5, 9, 200, 7, 7, 41, 300, 2), (3, 17, 90)]
    assert trace.has(2, "ffn_out")
    assert len(trace.manifest.model["sha256"]) == 64


def test_stages_of_apr_become_a_trace(paths: dict[str, Path], driftscope: Runner, tmp_path: Path) -> None:
    """A stage file: APRT, the layer, the count, little-endian float32."""
    recorded = Trace(paths["clean"])
    (_, ids), *_ = recorded.manifest.prompts
    array = recorded.tap(1, "ffn_out")[: len(ids)]
    stage = tmp_path / "apr" / "layer-1" / "ffn_out.bin"
    stage.parent.mkdir(parents=True)
    stage.write_bytes(b"APRT" + struct.pack("<II", 1, array.size) + array.astype("<f4").tobytes())
    given = ("--engine", "apr", "--stages", tmp_path / "apr", "--ids", ",".join(map(str, ids)))
    code, text, _ = driftscope("trace", paths["teacher"], *given, "--out", tmp_path / "t")
    assert code == 0
    assert f"{len(ids)} tokens of 1 prompt" in text
    found = Trace(tmp_path / "t")
    assert found.places == {(1, "ffn_out")}
    assert np.array_equal(found.tap(1, "ffn_out"), array)


def test_only_some_taps(paths: dict[str, Path], driftscope: Runner, tmp_path: Path) -> None:
    code, text, _ = driftscope(
        *("trace", paths["teacher"], *IDS, "--taps", "layers.*.ffn_out", "--taps", "lm_head", "--json"),
        *("--out", tmp_path / "t"),
    )
    assert code == 0
    assert json.loads(text)["engine"] == {"name": "driftscope"}
    assert Trace(tmp_path / "t").places == {*((layer, "ffn_out") for layer in range(3)), (-1, "lm_head")}


def test_the_prompts_of_another_trace(paths: dict[str, Path], driftscope: Runner, tmp_path: Path) -> None:
    prompts = paths["clean"] / "trace.json"
    code, _, _ = driftscope("trace", paths["teacher"], "--prompts", prompts, "--out", tmp_path / "t")
    assert code == 0
    assert Trace(tmp_path / "t").manifest.prompts == Trace(paths["clean"]).manifest.prompts


@pytest.mark.model
def test_text_is_encoded(default_gguf: Path, driftscope: Runner, tmp_path: Path) -> None:
    code, _, _ = driftscope(
        *("trace", default_gguf, "--prompt", "What is 2+2?", "--taps", "embedding", "--out", tmp_path / "t")
    )
    assert code == 0
    assert Trace(tmp_path / "t").manifest.prompts == (("text-1", (1780, 314, 216, 34, 27, 34, 47)),)


def test_equal_traces(paths: dict[str, Path], driftscope: Runner, tmp_path: Path) -> None:
    driftscope("trace", paths["model.gguf"], *IDS, "--out", tmp_path / "again")
    code, text, _ = driftscope("compare", paths["f32"], tmp_path / "again")
    assert code == 0
    assert "f32 and again are equal, bit for bit, at all 54 taps" in text


def test_traces_that_differ_hold_unless_a_limit_is_set(paths: dict[str, Path], driftscope: Runner) -> None:
    code, text, _ = driftscope("compare", paths["clean"], paths["f32"])
    assert code == 0
    assert "first difference: layers.0.qkv_matmul" in text
    assert max(map(len, text.split("\n\n")[1].splitlines()[1:-4])) <= 80
    code, text, _ = driftscope("compare", paths["clean"], paths["f32"], "--max-nmse", "1e-9")
    assert code == 1
    assert "above an NMSE of 1e-09" in text
    code, _, _ = driftscope(
        "compare", paths["clean"], paths["f32"], "--max-nmse", "1e-9", "--layers", "0:0,-1"
    )
    assert code == 1


def test_the_error_is_split_where_the_weights_are_given(paths: dict[str, Path], driftscope: Runner) -> None:
    arguments = ("compare", paths["clean"], paths["faulty"], "--weights", paths["model.gguf"])
    code, text, _ = driftscope(*arguments)
    assert code == 0
    lines = {line.split()[1]: line.split() for line in text.splitlines() if line.startswith("layer ")}
    assert lines["0"][3:6] == ["0", "0", "0"]
    assert lines["1"][3] == lines["1"][6] != "0"  # all of it is injected
    assert lines["2"][3] == "0"
    assert lines["2"][4] == lines["2"][6] != "0"  # all of it is inherited
    code, text, _ = driftscope(*arguments, "--json")
    (travelled,) = json.loads(text)["propagation"]
    assert [step["tap"] for step in travelled["steps"]] == [
        "embedding",
        *3 * ["post_ffn_residual"],
        "lm_head",
    ]


def test_other_tokens_do_not_hold(paths: dict[str, Path], driftscope: Runner) -> None:
    code, text, _ = driftscope("compare", paths["clean"], paths["other"])
    assert code == 1
    assert "inadmissible: all traces read the same token ids" in text
    assert "NMSE" not in text


def test_three_traces_vote(paths: dict[str, Path], driftscope: Runner, tmp_path: Path) -> None:
    driftscope(
        *("trace", paths["model.gguf"], "--engine", "llama.cpp", "--out", tmp_path / "llama"),
        *("--prompts", paths["clean"] / "trace.json"),
    )
    code, text, _ = driftscope("compare", paths["clean"], paths["faulty"], tmp_path / "llama", "--json")
    assert code == 1
    (odd,) = json.loads(text)["vote"]["odd"]
    assert (odd["source"], odd["layer"], odd["tap"]) == ("faulty", 1, "ffn_gate")


def test_a_clean_replay(paths: dict[str, Path], driftscope: Runner, tmp_path: Path) -> None:
    table = tmp_path / "rows.parquet"
    code, text, _ = driftscope(
        *("replay", paths["clean"], "--weights", paths["model.gguf"]),
        *("--reference", paths["teacher"], "--out", table),
    )
    assert code == 0
    assert "clean: 66 ops in 2 prompts at their floors" in text
    frame = read_table(table, "replay")
    assert set(frame["component"]) == {"engine", "arithmetic", "model"}


def test_a_faulty_replay(paths: dict[str, Path], driftscope: Runner) -> None:
    code, text, _ = driftscope("replay", paths["faulty"], "--weights", paths["model.gguf"])
    assert code == 1
    assert "port on model.gguf" in text
    assert "first: layers.1.ffn_gate (engine), gate-up-swapped" in text
    code, text, _ = driftscope(
        "replay", paths["faulty"], "--weights", paths["model.gguf"], "--layers", "0,2", "--json"
    )
    assert code == 0
    assert json.loads(text)["first"] is None


def test_a_guessed_arithmetic(paths: dict[str, Path], driftscope: Runner) -> None:
    code, text, _ = driftscope(
        "replay", paths["faulty"], "--weights", paths["model.gguf"], "--arithmetic", "guess", "--json"
    )
    assert code == 1
    found = json.loads(text)
    assert found["guess"]["arithmetic"]["path"] == found["arithmetic"]["path"] == "int8-dot"
    assert found["first"]["tap"] == "ffn_gate"


def test_the_wrong_arithmetic_is_no_floor(paths: dict[str, Path], driftscope: Runner) -> None:
    code, text, _ = driftscope(
        "replay", paths["clean"], "--weights", paths["model.gguf"], "--arithmetic", "f32"
    )
    assert code == 1
    assert "first: layers.0.qkv_matmul" in text
    assert "of another arithmetic than the declared one: int8-dot" in text
    assert "--arithmetic guess" in text


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("trace", "{teacher}", "--out", "{tmp}"), "there is no prompt; give --prompt TEXT"),
        (("trace", "{teacher}", "--ids", "1,x", "--out", "{tmp}"), "--ids 1,x: expected token ids"),
        (("trace", "{teacher}", "--ids", "400", "--out", "{tmp}"), "token id 400"),
        (
            ("trace", "{teacher}", *IDS, "--engine", "vllm", "--out", "{tmp}"),
            "expected one of own, llama.cpp",
        ),
        (
            ("trace", "{teacher}", *IDS, "--dtype", "bf16", "--out", "{tmp}"),
            "--dtype: is an option of tra",
        ),
        (("trace", "{teacher}", *IDS, "--path", "int4", "--out", "{tmp}"), "path 'int4' is unknown"),
        (("trace", "{teacher}", *IDS, "--engine", "llama.cpp", "--out", "{tmp}"), "llama.cpp reads GGUF"),
        (
            ("trace", "{model.gguf}", *IDS, "--engine", "transformers", "--out", "{tmp}"),
            "a safetensors folder",
        ),
        (("trace", "{teacher}", *IDS, "--engine", "apr", "--out", "{tmp}"), "needs --stages"),
        (
            ("trace", "{teacher}", *IDS, "--engine", "apr", "--stages", "x", "--out", "{tmp}"),
            "one prompt; got 2",
        ),
        (("trace", "{teacher}", "--prompts", "{clean}", "--out", "{tmp}"), "is not readable JSON"),
        (("compare", "{clean}", "{teacher}"), "trace.json"),
        (("compare", "{clean}", "{clean}"), "is given twice"),
        (("compare", "{clean}", "{f32}", "--layers", "a:b"), "--layers a:b: expected e.g. 3, 0:4 or -1"),
        (("replay", "{clean}", "--weights", "{clean}"), "{clean}"),
        (
            ("replay", "{clean}", "--weights", "{teacher}", "--arithmetic", "int4"),
            "--arithmetic int4: expec",
        ),
        (("replay", "{clean}", "--weights", "{teacher}", "--out", "rows.csv"), "ends with .parquet"),
        (("replay", "{clean}", "--weights", "{teacher}", "--floors", "{clean}/trace.json"), "trace.json"),
    ],
)
def test_bad_input_is_one_line_and_exits_with_2(
    arguments: tuple[str, ...], says: str, paths: dict[str, Path], driftscope: Runner, tmp_path: Path
) -> None:
    places = {**paths, "tmp": tmp_path / "out"}
    words = list(arguments)
    for name, path in places.items():
        words = [word.replace(f"{{{name}}}", str(path)) for word in words]
        says = says.replace(f"{{{name}}}", str(path))
    code, out, err = driftscope(*words)
    assert (code, out) == (2, ""), err
    assert err.count("\n") == 1
    assert says in err
    assert not (tmp_path / "out" / "trace.json").exists()


def test_the_port_of_the_page_is_found(
    driftscope: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What docs/howto/compare-engines.md does, with a model of thirteen layers."""
    page = (Path(__file__).parents[2] / "docs" / "howto" / "compare-engines.md").read_text("utf-8")
    (script,) = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    monkeypatch.chdir(tmp_path)
    teacher = write_model(Path("results/ship_007/models/teacher"), "llama", num_hidden_layers=13)
    assert driftscope("trace", teacher, "--engine", "transformers", *IDS, "--out", "traces/torch")[0] == 0
    exec(compile(script, "compare-engines.md", "exec"), {})
    code, text, _ = driftscope("replay", "traces/port", "--weights", teacher)
    assert code == 1
    assert "first: layers.12.ffn_silu (engine), activation-function" in text
    assert "the activation is GELU with tanh instead of SiLU" in text
    assert driftscope("trace", teacher, *IDS, "--out", "traces/own")[0] == 0
    code, text, _ = driftscope("compare", "traces/torch", "traces/own", "traces/port")
    assert code == 1
    assert "port is the odd one out from layers.12.ffn_silu on" in text
