from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tests.forward.models import write_model

from driftscope.artifacts.model import ModelConfig
from driftscope.artifacts.open import open_artifact
from driftscope.engines import own
from driftscope.engines.aprt import STAGES, convert_aprt
from driftscope.engines.trace import RAGGED, Trace
from driftscope.errors import InputError
from driftscope.forward.arithmetic import Arithmetic
from driftscope.forward.policy import WHOLE_MODEL

IDS = [5, 9, 200, 7, 7, 41]
"""Six tokens: they divide 96 and 576 channels, so that counts alone tell nothing."""


def stage_file(path: Path, layer: int, array: np.ndarray) -> Path:
    """Written here by the layout's description alone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    flat = np.ascontiguousarray(array, dtype="<f4").ravel()
    path.write_bytes(b"APRT" + struct.pack("<II", layer, flat.size) + flat.tobytes())
    return path


def dump(folder: Path, trace: Trace, *, last: tuple[str, ...] = ("lm_head",), ids: int = len(IDS)) -> Path:
    """The stage files of a trace; those of `last` hold the last token only."""
    for layer, tap in sorted(trace.places):
        if tap in RAGGED:
            rows = trace.ragged(layer, tap)[0]
            array = rows.reshape(ids, -1, ids).swapaxes(0, 1)
            array = array[:, -1:] if tap in last else array
        else:
            array = trace.tap(layer, tap)
            array = array[-1:] if tap in last else array
        stage = "ffn_swigl" if tap == "ffn_swiglu" else tap
        number = 0 if tap == "embedding" else layer
        if number == WHOLE_MODEL:
            stage_file(folder / f"{stage}.bin", 0xFFFFFFFF, array)
        else:
            stage_file(folder / f"layer-{number}" / f"{stage}.bin", number, array)
    (folder / "_PROVENANCE.txt").write_text("not a stage")
    return folder


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Trace:
    folder = tmp_path_factory.mktemp("ours")
    artifact = open_artifact(write_model(folder / "model", "qwen2"))
    return own.trace(artifact, [("prompt", IDS)], folder / "trace", Arithmetic.of())


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    return open_artifact(write_model(tmp_path_factory.mktemp("model"), "qwen2")).config


def test_every_stage_becomes_its_tap(ours: Trace, config: ModelConfig, tmp_path: Path) -> None:
    dump(tmp_path / "apr", ours)
    found = convert_aprt(tmp_path / "apr", IDS, tmp_path / "trace", config=config, arithmetic=Arithmetic.of())
    assert found.places == ours.places - {(WHOLE_MODEL, "lm_head")}
    assert found.manifest.absent == {"lm_head": "it was saved of the last token only"}
    assert found.manifest.prompts == ours.manifest.prompts
    assert found.manifest.engine["name"] == "apr"
    assert found.manifest.arithmetic == Arithmetic.of()
    assert set(found.manifest.capture_points) == {tap for _, tap in found.places}
    for layer, tap in found.places:
        read = [
            trace.ragged(layer, tap)[0] if tap in RAGGED else trace.tap(layer, tap) for trace in (found, ours)
        ]
        assert np.array_equal(*read), (layer, tap)


def test_every_published_stage_is_known() -> None:
    published = (
        "embedding attn_norm qkv_matmul qkv_bias q_post_rope k_post_rope attn_scores attn_softmax attention "
        "attn_out post_attn_residual ffn_norm ffn_gate ffn_up ffn_silu ffn_swigl ffn_out post_ffn_residual "
        "final_norm lm_head"
    )
    assert set(STAGES) == {*published.split(), "ffn_swiglu"}


def test_without_the_model_the_caller_vouches(ours: Trace, tmp_path: Path) -> None:
    dump(tmp_path / "apr", ours)
    with pytest.raises(InputError, match="may be those of 6 tokens or of the last one; give the model's"):
        convert_aprt(tmp_path / "apr", IDS, tmp_path / "trace")
    found = convert_aprt(tmp_path / "apr", IDS, tmp_path / "trace", all_tokens=True)
    assert found.places == ours.places - {(WHOLE_MODEL, "lm_head")}
    assert np.array_equal(found.tap(2, "ffn_swiglu"), ours.tap(2, "ffn_swiglu"))


def test_last_tokens_are_no_trace(ours: Trace, config: ModelConfig, tmp_path: Path) -> None:
    """The published comparison set one beside the other."""
    dump(tmp_path / "apr", ours, last=tuple(STAGES))
    with pytest.raises(
        InputError, match="every stage holds the last of 6 tokens only, and a trace is of all"
    ):
        convert_aprt(tmp_path / "apr", IDS, tmp_path / "trace", config=config)
    assert not (tmp_path / "trace").exists()


def test_a_stage_of_the_last_token_is_left_out(ours: Trace, config: ModelConfig, tmp_path: Path) -> None:
    dump(tmp_path / "apr", ours, last=("ffn_out", "attn_scores"))
    last = ours.tap(1, "attn_out")[-1:]
    stage_file(tmp_path / "apr/layer-1/attn_out.bin", 1, last)
    found = convert_aprt(tmp_path / "apr", IDS, tmp_path / "trace", config=config)
    assert not any(tap in ("ffn_out", "attn_scores") for _, tap in found.places)
    assert found.manifest.absent == {
        "attn_out": "it was saved of the last token only (layers 1)",
        "ffn_out": "it was saved of the last token only",
        "attn_scores": "it was saved of the last token only",
    }


def test_one_token_is_its_own_last(config: ModelConfig, tmp_path: Path) -> None:
    x = np.arange(config.vocab_size, dtype=np.float32)
    stage_file(tmp_path / "apr/lm_head.bin", 0xFFFFFFFF, x)
    found = convert_aprt(tmp_path / "apr", [3], tmp_path / "trace")
    assert np.array_equal(found.tap(WHOLE_MODEL, "lm_head"), x[None])


@pytest.mark.parametrize("count", [0, 1, 95, 112, 112 * 5, 112 * 6 + 1, 112 * 7])
def test_a_number_of_values_that_does_not_fit(count: int, config: ModelConfig, tmp_path: Path) -> None:
    """All tokens of 112 channels are 672 values; 112 are the last token's."""
    stage_file(tmp_path / "apr/layer-0/attn_norm.bin", 0, np.ones(count, np.float32))
    with pytest.raises(InputError) as caught:
        convert_aprt(tmp_path / "apr", IDS, tmp_path / "trace", config=config)
    expected = {0: "expected one value or more", 112: "the last of 6 tokens only"}
    assert expected.get(count, "expected 672 for 6 tokens or 112 for the last one") in str(caught.value)
    if count and count % 6:
        with pytest.raises(InputError, match="are not those of 6 tokens; expected a multiple of 6"):
            convert_aprt(tmp_path / "apr", IDS, tmp_path / "trace", all_tokens=True)


MALFORMED = {
    "no header": (b"APRT\0\0\0\0", "a header of 12 bytes"),
    "nothing": (b"", "a header of 12 bytes"),
    "another magic": (b"APRX" + struct.pack("<II", 0, 1) + b"\0" * 4, "expected APRT"),
    "cut": (b"APRT" + struct.pack("<II", 0, 3) + b"\0" * 11, "3 values take 24 bytes, but the file has 23"),
    "too long": (b"APRT" + struct.pack("<II", 0, 3) + b"\0" * 13, "but the file has 25"),
    "a huge count": (b"APRT" + struct.pack("<II", 0, 2**32 - 1) + b"\0" * 4, "4294967295 values take"),
    "another layer": (
        b"APRT" + struct.pack("<II", 2, 1) + b"\0" * 4,
        "the header says layer 2, which is not",
    ),
    "no layer": (b"APRT" + struct.pack("<II", 2**32 - 1, 1) + b"\0" * 4, "the header says the whole model"),
}


@pytest.mark.parametrize("case", sorted(MALFORMED))
def test_a_malformed_file(case: str, tmp_path: Path) -> None:
    content, message = MALFORMED[case]
    path = stage_file(tmp_path / "apr/layer-0/attn_norm.bin", 0, np.ones(1))
    path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        convert_aprt(tmp_path / "apr", IDS, tmp_path / "trace", all_tokens=True)
    assert message in str(caught.value)
    assert "attn_norm.bin" in str(caught.value)


@pytest.mark.parametrize(
    ("path", "layer", "message"),
    [
        ("layer-0/ffn_middle.bin", 0, "the stage is unknown; expected one of embedding, attn_norm"),
        ("layer-0/lm_head.bin", 0, "lm_head is not looked for there"),
        ("layer-1/embedding.bin", 1, "embedding is not looked for there"),
        ("attn_norm.bin", 0xFFFFFFFF, "attn_norm is not looked for there"),
        ("layer-01/attn_norm.bin", 1, "layer-01: expected a folder layer-<N>"),
        ("layer-x/attn_norm.bin", 1, "layer-x: expected a folder layer-<N>"),
        ("layer-/attn_norm.bin", 1, "expected a folder layer-<N>"),
    ],
)
def test_a_file_in_the_wrong_place(path: str, layer: int, message: str, tmp_path: Path) -> None:
    stage_file(tmp_path / "apr" / path, layer, np.ones(6))
    with pytest.raises(InputError) as caught:
        convert_aprt(tmp_path / "apr", IDS, tmp_path / "trace", all_tokens=True)
    assert message in str(caught.value)


def test_one_stage_under_two_names(tmp_path: Path) -> None:
    for stage in ("ffn_swigl", "ffn_swiglu"):
        stage_file(tmp_path / f"apr/layer-0/{stage}.bin", 0, np.ones(6))
    with pytest.raises(InputError, match=r"ffn_swiglu\.bin: the same stage is in .*ffn_swigl\.bin"):
        convert_aprt(tmp_path / "apr", IDS, tmp_path / "trace", all_tokens=True)


def test_a_layer_that_the_model_does_not_have(config: ModelConfig, tmp_path: Path) -> None:
    stage_file(tmp_path / "apr/layer-3/attn_norm.bin", 3, np.ones(672))
    with pytest.raises(InputError, match="layer 3 of a model of 3 layers"):
        convert_aprt(tmp_path / "apr", IDS, tmp_path / "trace", config=config)


def test_a_token_outside_of_the_vocabulary(config: ModelConfig, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="token id 320 is outside of the vocabulary of 320 tokens"):
        convert_aprt(tmp_path, [320], tmp_path / "trace", config=config)


def test_a_folder_without_stages(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no stage files; expected layer-<N>/<stage>"):
        convert_aprt(tmp_path, IDS, tmp_path / "trace")
    with pytest.raises(InputError, match="cannot be listed"):
        convert_aprt(tmp_path / "nothing", IDS, tmp_path / "trace")
    with pytest.raises(InputError, match="sequence 0 is empty"):
        convert_aprt(tmp_path, [], tmp_path / "trace")


def test_what_is_not_finite_stays(tmp_path: Path) -> None:
    x = np.array([[np.nan, np.inf], [-np.inf, 1]], np.float32)
    stage_file(tmp_path / "apr/layer-0/ffn_out.bin", 0, x)
    found = convert_aprt(tmp_path / "apr", [1, 2], tmp_path / "trace", all_tokens=True)
    assert np.array_equal(found.tap(0, "ffn_out"), x, equal_nan=True)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@example(content=b"APRT" + struct.pack("<II", 0, 2) + b"\0" * 8)
@given(content=st.binary(max_size=64) | st.binary(max_size=40).map(lambda tail: b"APRT" + tail))
def test_any_bytes_are_read_or_refused_in_one_line(content: bytes, tmp_path: Path) -> None:
    path = stage_file(tmp_path / "apr/layer-0/ffn_out.bin", 0, np.ones(2))
    path.write_bytes(content)
    message = ""
    try:
        convert_aprt(tmp_path / "apr", [1, 2], tmp_path / "trace", all_tokens=True)
    except InputError as error:
        message = str(error)
    assert "\n" not in message
    count = int.from_bytes(content[8:12], "little")
    whole = count > 0 and count % 2 == 0 and len(content) == 12 + 4 * count
    assert (not message) == (whole and content[:8] == b"APRT\0\0\0\0")
