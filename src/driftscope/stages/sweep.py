"""Sweep: every tensor of the teacher against the candidate's, in shards of about as many bytes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from driftscope.evidence.digest import sha256_file
from driftscope.evidence.header import EvidenceHeader
from driftscope.evidence.manifest import open_model
from driftscope.evidence.store import read_json, read_table, write_json, write_table
from driftscope.stages.device import device_parameter, take_device


def shard(
    teacher: Path,
    candidate: Path,
    index: int,
    count: int,
    out: Path,
    *,
    threads: int,
    device: str = "cpu",
) -> None:
    """Compare the tensors of one shard.

    A shard without tensors writes the row of no tensor: it repeats none, so that the joined table stays
    complete and without doubles.
    """
    from driftscope.analysis.pairs import pairs, plan_shards
    from driftscope.analysis.tensor_comparison import compare_tensor
    from driftscope.errors import InputError
    from driftscope.evidence.schemas import frame_of
    from driftscope.kernels.device import kernels_on

    a, digest_a = open_model(teacher)
    b, digest_b = open_model(candidate)
    found = {pair.tensor: pair for pair in pairs(a, b)}
    if not found:
        raise InputError(
            f"{a.path} and {b.path}: no tensor has the same name on both sides; nothing to compare"
        )
    plan = plan_shards({name: pair.nbytes for name, pair in found.items()}, count)
    if not plan[index]:
        raise InputError(
            f"sweep.shards is {count}, but there are only {len(found)} tensors; use fewer shards"
        )
    device = take_device(device)
    kernels = kernels_on(device, threads)
    rows = [
        compare_tensor(found[name].a, found[name].b, tensor=name, kernels=kernels) for name in plan[index]
    ]
    parameters = {"shard": [index, count], **device_parameter(device)}
    header = EvidenceHeader.of("sweep", {"a": digest_a, "b": digest_b}, parameters)
    write_table(frame_of(rows, "sweep"), out, "sweep", header)


def join(teacher: Path, candidate: Path, shards: Sequence[Path], out: Path, inventory_out: Path) -> None:
    """Join the shards in the order of the teacher's tensors, and list what has no counterpart."""
    import polars as pl

    from driftscope.analysis.inventory import inventory
    from driftscope.analysis.pairs import pairs

    a, digest_a = open_model(teacher)
    b, digest_b = open_model(candidate)
    order = {pair.tensor: index for index, pair in enumerate(pairs(a, b))}
    frame = pl.concat([read_table(path, "sweep") for path in shards])
    frame = frame.sort(pl.col("tensor").replace_strict(order, return_dtype=pl.Int64))
    header = EvidenceHeader.of("sweep", {"a": digest_a, "b": digest_b}, {})
    write_table(frame, out, "sweep", header)
    write_json(inventory(a, b), inventory_out, header)


def judge(
    teacher: Path,
    candidate: Path,
    table: Path,
    inventory_path: Path,
    band: tuple[float, float],
    out: Path,
    *,
    threads: int = 1,
    device: str = "cpu",
) -> None:
    """Say what each tensor of the candidate is to the teacher's.

    What the table explains is not read again; tensors that nothing explains are searched.
    """
    from driftscope.analysis.relate import relate
    from driftscope.analysis.relations import Band
    from driftscope.analysis.sweep_summary import summarise
    from driftscope.kernels.device import kernels_on

    a, digest_a = open_model(teacher)
    b, digest_b = open_model(candidate)
    rows = read_table(table, "sweep").to_dicts()
    inventory = read_json(inventory_path)
    device = take_device(device)
    relations = relate(rows, inventory, Band(*band), a, b, kernels=kernels_on(device, threads))
    inputs = {
        "a": digest_a,
        "b": digest_b,
        "sweep": sha256_file(table),
        "inventory": sha256_file(inventory_path),
    }
    parameters = {"band": list(band), **device_parameter(device)}
    header = EvidenceHeader.of("sweep", inputs, parameters)
    write_json(summarise(rows, inventory, relations), out, header)
