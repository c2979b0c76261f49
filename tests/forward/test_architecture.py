from __future__ import annotations

from pathlib import Path

import pytest
from tests.forward.models import SWITCHES, write_model

from driftscope.artifacts.complete import expected_shapes
from driftscope.artifacts.open import open_artifact
from driftscope.forward import architecture
from driftscope.forward.policy import MATMUL_SITES, SITES, WHOLE_MODEL


@pytest.mark.parametrize("name", sorted(SWITCHES))
def test_every_site_names_a_tensor_of_the_model(name: str, tmp_path: Path) -> None:
    artifact = open_artifact(write_model(tmp_path, name))
    shapes = expected_shapes(artifact.config)
    for site in MATMUL_SITES:
        layer = WHOLE_MODEL if site == "lm_head" else artifact.config.num_layers - 1
        tensor = architecture.site_tensor(artifact.config, layer, site)
        assert shapes[tensor] == architecture.site_shape(artifact.config, site)
        assert artifact.tensors[tensor].shape == shapes[tensor]


def test_ops_come_after_what_they_read(tmp_path: Path) -> None:
    config = open_artifact(write_model(tmp_path, "qwen3")).config
    made = {"layer_input"}
    for op in architecture.layer_ops(config):
        assert set(op.inputs) <= made
        assert set(op.sites) <= set(SITES)
        assert op.capture_point
        assert (op.channels == 0) == op.ragged
        made.add(op.tap)


def test_taps_have_one_name_each(tmp_path: Path) -> None:
    config = open_artifact(write_model(tmp_path, "llama")).config
    names = [tap.name for tap in architecture.taps(config)]
    assert len(names) == len(set(names)) == 3 + 17 * config.num_layers
    assert (names[0], names[1], names[-2], names[-1]) == (
        "embedding",
        "layers.0.attn_norm",
        "final_norm",
        "lm_head",
    )
