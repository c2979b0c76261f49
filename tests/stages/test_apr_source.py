"""A case whose teacher is an .apr file: each stage up to the sweep and the trace."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import yaml
from tests.workflow.case import CONFIG, write_model

from driftscope.artifacts.derive.convert import convert
from driftscope.artifacts.lock import lock_config
from driftscope.artifacts.open import open_artifact
from driftscope.config import load_config
from driftscope.errors import InputError
from driftscope.evidence.manifest import open_model
from driftscope.evidence.store import read_json, read_table
from driftscope.stages import models, prompts, sweep, trace


def test_stages(tmp_path: Path) -> None:
    write_model(tmp_path / "m.gguf")
    convert(open_artifact(tmp_path / "m.gguf"), tmp_path / "models" / "m.apr")
    document = {
        **CONFIG,
        "models": {
            "teacher": {"source": "file:models/m.apr"},
            "candidate": {"derive": "candidate", "from": "teacher", "scheme": "Q4_K_M"},
        },
        "decomposition": {**CONFIG["decomposition"], "texts": [{"id": "said", "text": "Nothing was said."}]},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(document, sort_keys=False))
    config = load_config(tmp_path / "config.yaml")
    lock_config(config.sources(), tmp_path / "config.yaml")
    teacher, candidate = (tmp_path / "case" / "models" / f"{role}.json" for role in ("teacher", "candidate"))

    models.fetch(config, "teacher", teacher)
    assert read_json(teacher)["container"] == "apr"
    models.derive(config, "candidate", teacher, candidate, threads=1, progress=None)
    artifact, _ = open_model(teacher)
    assert artifact.container == "apr"

    prompts.encode(config, teacher, tmp_path / "prompts.json")
    table, found, listed, blocks = (
        tmp_path / name for name in ("shard.parquet", "found.json", "sweep.json", "blocks.json")
    )
    sweep.shard(teacher, candidate, 0, 1, table, found, threads=1)
    sweep.join(teacher, candidate, [table], [found], tmp_path / "sweep.parquet", listed, blocks)
    joined = read_table(tmp_path / "sweep.parquet", "sweep")
    assert joined["compared_count"].sum() == joined["element_count"].sum()
    assert read_json(listed)["missing"] == []
    # An .apr file of floats is the teacher; the candidate's blocks are looked into.
    assert read_json(blocks)["totals"]["tensors"] == joined.height

    outputs = [tmp_path / name for name in ("trace.parquet", "taps.safetensors", "state.safetensors")]
    trace.chunk(teacher, "teacher.f32", tmp_path / "prompts.json", 0, 1, ["*"], None, *outputs, threads=1)
    assert np.isfinite(read_table(outputs[0], "trace")["std"].drop_nulls().to_numpy()).all()


def test_a_source_that_is_corrupt_is_not_fetched(tmp_path: Path) -> None:
    write_model(tmp_path / "m.gguf")
    convert(open_artifact(tmp_path / "m.gguf"), tmp_path / "m.apr")
    data = bytearray((tmp_path / "m.apr").read_bytes())
    data[-77] ^= 1
    (tmp_path / "m.apr").write_bytes(data)
    models_of = {**CONFIG["models"], "source": {"source": "file:m.apr"}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({**CONFIG, "models": models_of}))
    config = load_config(tmp_path / "config.yaml")
    lock_config(config.sources(), tmp_path / "config.yaml")
    with pytest.raises(InputError, match=r"m\.apr: the checksum of the file is"):
        models.fetch(config, "source", tmp_path / "models" / "source.json")
    assert not (tmp_path / "models" / "source.json").exists()
