"""Falsify and judge: a measurement, its verdict, the ship gates. Each is a file of its own."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from driftscope.contracts import commands
from driftscope.evidence.digest import sha256_file
from driftscope.evidence.header import EvidenceHeader
from driftscope.evidence.store import read_json, read_table, write_json
from driftscope.falsifiers.reader import FolderReader
from driftscope.report.weights import weights_section
from driftscope.stages.device import device_parameter, take_device


def measure(contract: Path, falsifier: str, results: Path, out: Path, device: str = "cpu") -> None:
    """Measure one falsifier on a results folder's evidence; `device` is a request, see `choose_device`."""
    device = take_device(device)
    document = commands.measure(contract, falsifier, results, device)
    reader = FolderReader(results)
    inputs = {name: sha256_file(reader.path(name)) for name in commands.inputs_of(contract, falsifier)}
    parameters = {"measurement": document["measurement"], **device_parameter(device)}
    write_json(document, out, EvidenceHeader.of("measure", inputs, parameters))


def judge(contract: Path, falsifier: str, measurement: Path, out: Path) -> str:
    """Judge one falsifier by its measurement; return the verdict."""
    document = commands.judge(contract, falsifier, read_json(measurement))
    inputs = {"measurement": sha256_file(measurement)}
    header = EvidenceHeader.of("judge", inputs, {}, clause=document["clause"])
    write_json(document, out, header)
    return str(document["verdict"])


def gate_documents(results: Path) -> dict[str, Any]:
    """Return what gates may read, under the names of the report's sections; what is not there is absent."""
    documents: dict[str, Any] = {
        name: read_json(results / f"{name}.json")
        for name in ("admissibility", "decomposition", "impact")
        if (results / f"{name}.json").is_file()
    }
    sweep = [results / name for name in ("sweep.parquet", "sweep.json", "weights.json")]
    if all(file.is_file() for file in sweep):
        table, inventory, summary = sweep
        documents["weights"] = weights_section(
            {
                "name": results.name,
                "sweep": read_table(table, "sweep"),
                "sweep_inventory": read_json(inventory),
                "sweep_summary": read_json(summary),
            }
        )
    for file in sorted((results / "falsifiers").glob("*.verdict.json")):
        documents.setdefault("falsifiers", {})[file.name.removesuffix(".verdict.json")] = read_json(file)
    return documents


def gates(contracts: Path, results: Path, out: Path) -> dict[str, str]:
    """Judge every ship gate of the contracts; return the status of each."""
    from driftscope.contracts.gates import judge_gates
    from driftscope.contracts.loading import load_contracts

    documents = gate_documents(results)
    judged = [gate for item in load_contracts([contracts]) for gate in judge_gates(item.contract, documents)]
    inputs = {name: sha256_file(results / name) for name in _read_by_gates(results)}
    write_json({"gates": judged}, out, EvidenceHeader.of("judge", inputs, {}))
    return {gate["id"]: gate["status"] for gate in judged}


def _read_by_gates(results: Path) -> list[str]:
    names = ["admissibility.json", "weights.json", "sweep.json", "sweep.parquet"]
    names += ["decomposition.json", "impact.json"]
    found = [name for name in names if (results / name).is_file()]
    return found + [
        f"falsifiers/{file.name}" for file in sorted((results / "falsifiers").glob("*.verdict.json"))
    ]


def published(figures: Path, results: Path, out: Path) -> dict[str, int]:
    """Recompute and judge every published figure; return how many came to each verdict."""
    from driftscope.contracts.published import falsifiers_read, judge_published, load_published
    from driftscope.stages.at_hand import at_hand, manifests_of

    listed = load_published([figures])
    files = {name: results / "falsifiers" / f"{name}.measurement.json" for name in falsifiers_read(listed)}
    present = {name: file for name, file in files.items() if file.is_file()}
    measurements = {name: read_json(file) for name, file in present.items()}
    judged = judge_published(listed, measurements, at_hand(results))
    read = [*present.values(), *manifests_of(results)]
    inputs = {file.relative_to(results).as_posix(): sha256_file(file) for file in read}
    write_json({"published": judged}, out, EvidenceHeader.of("judge", inputs, {}))
    return dict(Counter(item["verdict"] for item in judged))
