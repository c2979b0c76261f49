"""Sweep: every tensor of the teacher against the candidate's, in shards of about as many bytes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import cast

from driftscope.errors import InputError
from driftscope.evidence.digest import sha256_file
from driftscope.evidence.documents import read_checked, write_checked
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
    blocks_out: Path,
    *,
    threads: int,
    device: str = "cpu",
) -> None:
    """Compare the tensors of one shard, and look into their blocks in the same pass.

    A shard without tensors writes the row of no tensor: it repeats none, so that the joined table stays
    complete and without doubles.
    """
    from driftscope.analysis.weights.corrupt_blocks import block_document
    from driftscope.analysis.weights.pairs import pairs, plan_shards
    from driftscope.analysis.weights.tensor_comparison import compare_tensor
    from driftscope.analysis.weights.watched_kernels import WatchedKernels
    from driftscope.evidence.schemas import frame_of
    from driftscope.kernels.device import Kernels, kernels_on

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
    rows, off = [], []
    for name in plan[index]:
        pair, watched = found[name], WatchedKernels(kernels)
        rows.append(compare_tensor(pair.a, pair.b, tensor=name, kernels=cast(Kernels, watched)))
        looked = watched.blocks(pair.a, pair.b, name)
        if looked is not None:
            off.append(looked.to_dict())
    parameters = {"shard": [index, count], **device_parameter(device)}
    header = EvidenceHeader.of("sweep", {"a": digest_a, "b": digest_b}, parameters)
    write_table(frame_of(rows, "sweep"), out, "sweep", header)
    write_checked(block_document(off), blocks_out, "blocks", header)


def join(
    teacher: Path,
    candidate: Path,
    shards: Sequence[Path],
    blocks: Sequence[Path],
    out: Path,
    inventory_out: Path,
    blocks_out: Path,
) -> None:
    """Join the shards in the order of the teacher's tensors, and list what has no counterpart."""
    import polars as pl

    from driftscope.analysis.weights.corrupt_blocks import block_document
    from driftscope.analysis.weights.inventory import inventory
    from driftscope.analysis.weights.pairs import pairs

    a, digest_a = open_model(teacher)
    b, digest_b = open_model(candidate)
    order = {pair.tensor: index for index, pair in enumerate(pairs(a, b))}
    frame = pl.concat([read_table(path, "sweep") for path in shards])
    frame = frame.sort(pl.col("tensor").replace_strict(order, return_dtype=pl.Int64))
    header = EvidenceHeader.of("sweep", {"a": digest_a, "b": digest_b}, {})
    write_table(frame, out, "sweep", header)
    write_json(inventory(a, b), inventory_out, header)
    looked = [tensor for path in blocks for tensor in read_checked(path, "blocks")["tensors"]]
    if unknown := {tensor["tensor"] for tensor in looked} - set(order):
        raise InputError(f"{blocks[0].parent}: blocks of {min(unknown)}, a tensor that was not compared")
    looked.sort(key=lambda tensor: order[tensor["tensor"]])
    write_checked(block_document(looked), blocks_out, "blocks", header)


def judge(
    teacher: Path,
    candidate: Path,
    table: Path,
    inventory_path: Path,
    blocks: Path,
    band: tuple[float, float],
    out: Path,
    *,
    threads: int = 1,
    device: str = "cpu",
) -> None:
    """Say what each tensor of the candidate is to the teacher's, and which of them hold a corrupt block.

    What the table explains is not read again; tensors that nothing explains are searched.
    """
    from driftscope.analysis.weights.corrupt_blocks import findings_in
    from driftscope.analysis.weights.relate import relate
    from driftscope.analysis.weights.relations import Band
    from driftscope.analysis.weights.summary import summarise
    from driftscope.kernels.device import kernels_on

    a, digest_a = open_model(teacher)
    b, digest_b = open_model(candidate)
    rows = read_table(table, "sweep").to_dicts()
    inventory = read_json(inventory_path)
    looked = read_checked(blocks, "blocks")
    device = take_device(device)
    relations = relate(rows, inventory, Band(*band), a, b, kernels=kernels_on(device, threads))
    inputs = {
        "a": digest_a,
        "b": digest_b,
        "sweep": sha256_file(table),
        "inventory": sha256_file(inventory_path),
        "blocks": sha256_file(blocks),
    }
    parameters = {"band": list(band), **device_parameter(device)}
    header = EvidenceHeader.of("sweep", inputs, parameters)
    summary = summarise(rows, inventory, relations, findings_in(looked))
    write_json({**summary, "blocks": looked["totals"]}, out, header)
