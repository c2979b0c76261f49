"""Digests of files, values and code; headers made of them."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

import pytest

import driftscope
from driftscope.evidence import digest
from driftscope.evidence.digest import STAGE_PACKAGES, code_digest, sha256_file, sha256_json
from driftscope.evidence.header import EvidenceHeader


def test_a_file_s_digest_is_sha256(tmp_path: Path) -> None:
    (tmp_path / "abc").write_bytes(b"abc")
    # FIPS 180-2, appendix B.1
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert sha256_file(tmp_path / "abc") == expected


def test_a_value_s_digest_does_not_depend_on_the_order_of_keys() -> None:
    assert sha256_json({"b": [1, 2.5], "a": "é"}) == sha256_json({"a": "é", "b": [1, 2.5]})
    assert sha256_json({"a": "é"}) == hashlib.sha256('{"a":"é"}'.encode()).hexdigest()
    assert sha256_json([1, 2]) != sha256_json([2, 1])
    assert sha256_json(1) != sha256_json("1")


@pytest.mark.parametrize("stage", STAGE_PACKAGES)
def test_code_digests_are_the_same_in_another_process(stage: str) -> None:
    program = f"from driftscope.evidence.digest import code_digest; print(code_digest({stage!r}))"
    source = str(Path(driftscope.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={"PYTHONHASHSEED": "7", "PYTHONPATH": source},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == code_digest(stage)


def test_a_stage_s_digest_is_that_of_its_packages_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(digest, "_PACKAGE", tmp_path)
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "module.py").write_text("x = 1\n")
    first, second = digest._digest_sources(["one"]), digest._digest_sources(["two"])
    (tmp_path / "two" / "module.py").write_text("x = 2\n")
    (tmp_path / "one" / "__pycache__").mkdir()
    (tmp_path / "one" / "__pycache__" / "module.pyc").write_bytes(b"compiled")
    assert digest._digest_sources(["one"]) == first
    assert digest._digest_sources(["two"]) != second
    (tmp_path / "one" / "module.py").rename(tmp_path / "one" / "other.py")
    assert digest._digest_sources(["one"]) != first


def test_a_single_module_counts_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digest, "_PACKAGE", tmp_path)
    (tmp_path / "one").mkdir()
    for name in ("a", "b"):
        (tmp_path / "one" / f"{name}.py").write_text("x = 1\n")
    before = digest._digest_sources(["one/a.py"])
    (tmp_path / "one" / "b.py").write_text("x = 2\n")
    assert digest._digest_sources(["one/a.py"]) == before
    (tmp_path / "one" / "a.py").write_text("x = 2\n")
    assert digest._digest_sources(["one/a.py"]) != before


def test_every_stage_names_packages_and_modules_that_exist() -> None:
    root = Path(driftscope.__file__).parent
    for names in STAGE_PACKAGES.values():
        for name in names:
            assert (root / name if name.endswith(".py") else root / name / "__init__.py").is_file(), name


def test_every_module_that_writes_evidence_counts_for_some_stage() -> None:
    named = {name for names in STAGE_PACKAGES.values() for name in names}
    for module in sorted((Path(driftscope.__file__).parent / "stages").glob("*.py")):
        if "EvidenceHeader.of(" in module.read_text("utf-8"):
            assert f"stages/{module.name}" in named


def test_a_header_does_not_depend_on_the_order_of_its_inputs() -> None:
    first = EvidenceHeader.of("sweep", {"a": "1", "b": "2"}, {"shard": [0, 2]})
    second = EvidenceHeader.of("sweep", {"b": "2", "a": "1"}, {"shard": [0, 2]})
    assert list(first.as_dict()["inputs"]) == list(second.as_dict()["inputs"]) == ["a", "b"]
    assert first == second
    assert first.parameters != EvidenceHeader.of("sweep", {}, {"shard": [1, 2]}).parameters
