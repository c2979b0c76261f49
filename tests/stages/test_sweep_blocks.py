"""A flipped bit in a small candidate, through every step of the sweep to the verdict."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.workflow.case import tiny_model_tensors, write_model

from driftscope.analysis.weights.corrupt_blocks import corrupt_tensors, findings_in
from driftscope.analysis.weights.pair_diff import diff_models
from driftscope.analysis.weights.relations import Band
from driftscope.artifacts.derive.candidate import write_candidate
from driftscope.artifacts.derive.teacher import write_teacher
from driftscope.artifacts.open import open_artifact
from driftscope.errors import InputError
from driftscope.evidence.header import EvidenceHeader
from driftscope.evidence.manifest import open_model, write_manifest
from driftscope.evidence.store import read_json, read_table
from driftscope.report.build import build_report
from driftscope.report.html import render_html
from driftscope.report.schema import validate_report
from driftscope.stages import sweep

BAND = (0.0, 1.6)
TENSOR = "model.layers.1.mlp.up_proj.weight"
ROW, BLOCK = 77, 0

# Scheme, bytes of a block, and a bit of a quant, of 8 and of 16 steps: little for a tensor of 65536 values.
QUANTS = [("Q4_K_M", 144, 60, 7), ("Q8_0", 34, 20, 4)]


class Pair:
    """A teacher, its candidate, and the steps of the sweep over them."""

    def __init__(self, folder: Path, scheme: str) -> None:
        self.folder = folder
        source = open_artifact(write_model(folder / "m.gguf", tiny_model_tensors()))
        write_teacher(source, folder / "teacher")
        write_candidate(open_artifact(folder / "teacher"), folder / "candidate.gguf", scheme=scheme)
        self.describe()

    def describe(self) -> None:
        """Write the manifests of the models as they are now."""
        for name, path in (("teacher", "teacher"), ("candidate", "candidate.gguf")):
            header = EvidenceHeader.of("derive", {}, {})
            write_manifest(self.folder / f"{name}.json", name, self.folder / path, header, {})

    def change(self, byte: int, value: bytes | int, block_bytes: int) -> int:
        """Write bytes into a block of the candidate, or turn one of its bits; return where in the file."""
        path = self.folder / "candidate.gguf"
        at = open_artifact(path).tensors[TENSOR].offset
        at += ROW * (256 // (256 if block_bytes == 144 else 32)) * block_bytes + BLOCK * block_bytes + byte
        data = bytearray(path.read_bytes())
        if isinstance(value, int):
            data[at] ^= 1 << value
        else:
            data[at : at + len(value)] = value
        path.write_bytes(data)
        self.describe()
        return at

    def swept(self, shards: int = 1, threads: int = 1) -> dict[str, Path]:
        """Run all steps of the sweep; the files that they leave."""
        out = self.folder / f"{shards}-{threads}"
        out.mkdir()
        a, b = self.folder / "teacher.json", self.folder / "candidate.json"
        tables = [out / f"shard_{index}.parquet" for index in range(shards)]
        found = [out / f"blocks_{index}.json" for index in range(shards)]
        for index in range(shards):
            sweep.shard(a, b, index, shards, tables[index], found[index], threads=threads)
        table, inventory, blocks = (out / name for name in ("sweep.parquet", "sweep.json", "blocks.json"))
        sweep.join(a, b, tables, found, table, inventory, blocks)
        sweep.judge(a, b, table, inventory, blocks, BAND, out / "weights.json", threads=threads)
        return {"table": table, "inventory": inventory, "blocks": blocks, "weights": out / "weights.json"}

    def report(self, files: dict[str, Path]) -> dict[str, Any]:
        """The report of a case where only the sweep was run."""
        report = build_report(
            {
                "name": "planted",
                "sweep": read_table(files["table"], "sweep"),
                "sweep_inventory": read_json(files["inventory"]),
                "sweep_summary": read_json(files["weights"]),
            }
        )
        validate_report(report, "report")
        return report


@pytest.mark.parametrize(("scheme", "block_bytes", "byte", "bit"), QUANTS)
def test_a_flipped_bit_is_a_bug_with_its_tensor_and_block(
    tmp_path: Path, scheme: str, block_bytes: int, byte: int, bit: int
) -> None:
    pair = Pair(tmp_path, scheme)
    at = pair.change(byte, bit, block_bytes)
    files = pair.swept()
    (finding,) = findings_in(read_json(files["blocks"]))
    columns = [0, 256 if block_bytes == 144 else 32]
    assert (finding["tensor"], finding["kind"]) == (TENSOR, "flipped-bit")
    assert (finding["row"], finding["columns"], finding["evidence"]["file_offset"]) == (ROW, columns, at)
    assert (finding["evidence"]["byte"], finding["evidence"]["bit"]) == (byte, bit)

    weights = read_json(files["weights"])
    # The error of the whole tensor is still the one of its format.
    assert (weights["conclusion"], weights["kinds"][TENSOR]) == ("quantized-from", "quantized-from")
    assert weights["corrupt"] == {TENSOR: "flipped-bit"}
    assert (weights["holds"], weights["at_fault"]) == (False, [TENSOR])
    assert weights["found"][TENSOR]["class"] == "corrupt-block"

    report = pair.report(files)
    verdict, section = report["verdict"], report["weights"]
    assert (verdict["class"], verdict["layer"], verdict["op"]) == ("bug", 1, "ffn_up")
    assert "corrupt block" in verdict["headline"]
    where = f"row {ROW}, columns 0 to {columns[1] - 1}"
    assert f"{TENSOR} holds a corrupt block ({where})" in verdict["summary"]
    assert "Class: corrupt-block" in verdict["reasons"][1]
    assert f"bit {bit} of byte {byte}" in verdict["reasons"][1]
    assert (section["corrupt_tensors"], section["unexplained"], section["blocks"]["found"]) == (1, 1, 1)
    page = render_html(report)
    assert finding["statement"] in page
    assert "corrupt block" in page


@pytest.mark.parametrize(("scheme", "block_bytes", "byte", "bit"), QUANTS)
def test_the_workflow_finds_and_decides_as_diff_does(
    tmp_path: Path, scheme: str, block_bytes: int, byte: int, bit: int
) -> None:
    pair = Pair(tmp_path, scheme)
    pair.change(byte, bit, block_bytes)
    weights = read_json(pair.swept()["weights"])
    (a, _), (b, _) = (open_model(tmp_path / f"{name}.json") for name in ("teacher", "candidate"))
    document = diff_models(a, b, band=Band(*BAND))
    for key in ("conclusion", "holds", "block_findings", "corrupt", "at_fault", "relations"):
        assert weights[key] == document["summary"][key]
    assert weights["at_fault"] == [row["tensor"] for row in document["tensors"] if not row["holds"]]


def test_a_clean_pair_has_no_findings_and_all_blocks_are_counted(tmp_path: Path) -> None:
    pair = Pair(tmp_path, "Q8_0")
    files = pair.swept()
    blocks, weights = read_json(files["blocks"]), read_json(files["weights"])
    elements = read_table(files["table"], "sweep")["element_count"].sum()
    assert blocks["totals"]["tensors"] == len(blocks["tensors"]) == len(weights["relations"])
    assert blocks["totals"]["block_count"] == elements // 32
    assert (blocks["totals"]["outlying_blocks"], findings_in(blocks)) == (0, [])
    assert (weights["holds"], weights["corrupt"], weights["block_findings"]) == (True, {}, [])
    section = pair.report(files)["weights"]
    assert (section["corrupt_tensors"], section["unexplained"], section["first_unlike"]) == (0, 0, None)


def test_the_same_bytes_for_any_shards_and_threads(tmp_path: Path) -> None:
    pair = Pair(tmp_path, "Q4_K_M")
    pair.change(60, 7, 144)
    one, three = pair.swept(1, 1), pair.swept(3, 2)
    for name in one:
        assert one[name].read_bytes() == three[name].read_bytes()


def test_a_scale_that_is_not_finite_is_a_corrupt_block(tmp_path: Path) -> None:
    pair = Pair(tmp_path, "Q8_0")
    pair.change(0, b"\xff\x7f", 34)
    files = pair.swept()
    weights = read_json(files["weights"])
    assert weights["kinds"][TENSOR] == "non-finite"
    assert weights["corrupt"] == {TENSOR: "non-finite-scale"}
    verdict = pair.report(files)["verdict"]
    assert verdict["class"] == "bug"
    assert f"{TENSOR} holds a corrupt block (row {ROW}, columns 0 to 31)" in verdict["summary"]
    assert "d of the block is nan" in verdict["reasons"][1]


def test_what_is_off_but_may_be_a_quantizers_own_makes_nothing_corrupt() -> None:
    kinds = ("outlying-error", "row-offset", "row-scaled", "zero-scale", "saturated-scale", "quants-at-rail")
    assert corrupt_tensors({"tensor": TENSOR, "kind": kind} for kind in kinds) == {}


def test_a_document_that_breaks_its_schema_is_refused(tmp_path: Path) -> None:
    pair = Pair(tmp_path, "Q8_0")
    pair.change(20, 7, 34)
    files = pair.swept()
    document = json.loads(files["blocks"].read_text("utf-8"))
    finding = findings_in(document)[0]
    spoilt = json.dumps(document).replace(json.dumps(finding["kind"]), '"fine"')
    files["blocks"].write_text(spoilt, "utf-8")
    a, b = tmp_path / "teacher.json", tmp_path / "candidate.json"
    out = tmp_path / "again.json"
    with pytest.raises(InputError, match=r"blocks\.json: breaks the schema of blocks at .*'fine'"):
        sweep.judge(a, b, files["table"], files["inventory"], files["blocks"], BAND, out)
    assert not out.exists()
