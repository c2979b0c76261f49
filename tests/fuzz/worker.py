"""Reads changed inputs one after the other, under limits of time and memory.

One line of JSON on standard output for each finding and one at the end. A process that dies leaves the input
that killed it in its folder.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

from driftscope.artifacts.complete import check_complete
from driftscope.artifacts.gguf import Strings
from driftscope.artifacts.model import Artifact
from driftscope.artifacts.open import open_artifact
from driftscope.artifacts.tensor import TensorRef
from driftscope.artifacts.tokenizers.folder_vocabulary import vocabulary_from_folder
from driftscope.artifacts.tokenizers.stop_tokens import stop_tokens
from driftscope.artifacts.tokenizers.tokenizer import load_tokenizer, model_folder
from driftscope.errors import InputError
from driftscope.kernels.dequantize import dequantize
from tests.fuzz.lines import Lines
from tests.fuzz.subjects import SUBJECTS, Case, Subject, clear, place

MAX_SECONDS = 5.0
MAX_BYTES = 2**30
_MAX_LINE = 2000
_MAX_CASE_BYTES = 2**18
_MAX_CORPUS = 400


class TooSlow(BaseException):
    """An input took longer than `MAX_SECONDS`."""


def read_all(path: Path) -> tuple[str, list[str]]:
    """Do with a model what driftscope does before it computes.

    Returns:
        ``opened`` or ``refused``, and the refusals.

    Raises:
        Exception: anything that is not an `InputError`: a finding.
    """
    refusals: list[str] = []

    def attempt(step: Callable[[], Any]) -> Any:
        try:
            return step()
        except InputError as error:
            refusals.append(str(error))
            return None

    artifact = attempt(lambda: open_artifact(path))
    if artifact is None:
        return "refused", refusals
    assert isinstance(artifact, Artifact)
    attempt(lambda: check_complete(artifact))
    if artifact.container == "safetensors":
        attempt(lambda: vocabulary_from_folder(model_folder(artifact), artifact.config.vocab_size))
    tokenizer = attempt(lambda: load_tokenizer(artifact))
    if tokenizer is not None:
        attempt(lambda: tokenizer.decode(tokenizer.encode("abc <tool>", add_special=True)))
        attempt(lambda: stop_tokens(artifact, tokenizer))
    for value in artifact.metadata.values():
        attempt(lambda value=value: list(value) if isinstance(value, Strings) else None)
    for ref in list(artifact.tensors.values())[:4] + list(artifact.tensors.values())[-4:]:
        attempt(lambda ref=ref: _values(ref))
    return ("refused" if refusals else "opened"), refusals


def _values(ref: TensorRef) -> None:
    raw = ref.raw()
    ref.row_order()
    values = dequantize(raw[:2], ref.dtype)
    assert values.shape == (min(2, ref.n_rows), ref.shape[-1])


def limited(step: Callable[[], Any]) -> Any:
    """Run a step; `TooSlow` once it has taken too long, and the end of the process if it does not notice.

    Nobody handles the second timer's signal: it ends a process that is inside a library for too long.
    """
    signal.setitimer(signal.ITIMER_REAL, MAX_SECONDS)
    signal.setitimer(signal.ITIMER_PROF, 3 * MAX_SECONDS)
    try:
        return step()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.setitimer(signal.ITIMER_PROF, 0)


def problem_of(path: Path) -> tuple[str, str | None, float]:
    """What became of one input: ``opened``, ``refused`` or ``finding``; the problem; seconds."""
    start = time.perf_counter()
    outcome, problem = "finding", None
    try:
        outcome, refusals = limited(lambda: read_all(path))
        for line in refusals:
            if "\n" in line or len(line) > _MAX_LINE:
                outcome, problem = (
                    "finding",
                    f"a refusal of {len(line)} characters or two lines: {line[:200]!r}",
                )
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException:
        problem = traceback.format_exc(limit=-6)
    seconds = time.perf_counter() - start
    if problem is None and seconds > MAX_SECONDS:
        outcome, problem = "finding", f"took {seconds:.1f} s"
    return outcome, problem, seconds


def _changed(subject: Subject, random: Random, case: Case, other: Case) -> Case | None:
    try:
        return subject.change(random, case, other)
    except RecursionError:  # JSON so deep that it can be read and not be written again
        return None


def _size(case: Case) -> int:
    return sum(len(content) for content in case.values() if isinstance(content, bytes))


def fuzz(format_: str, count: int, seed: int, folder: Path, report: Callable[[dict[str, Any]], None]) -> None:
    """Read `count` changed inputs; report each finding, and the counts at the end.

    Args:
        format_: a name in `SUBJECTS`.
        count: of inputs.
        seed: of all choices.
        folder: an empty one, for the inputs.
        report: takes one dictionary.
    """
    subject, random = SUBJECTS[format_], Random(seed)
    signal.signal(signal.SIGALRM, _too_slow)
    seeds: list[Case] = subject.seeds()
    path = folder / "case"
    path.mkdir()
    counts = {"opened": 0, "refused": 0, "findings": 0}
    slowest = 0.0
    lines = Lines()
    with lines:
        for case in seeds:
            clear(path)
            place(case, path)
            problem_of(path / subject.main(case))
        # Memory from here on: what the interpreter and the libraries took is not an input's doing.
        limit = _virtual_bytes() + MAX_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        corpus = list(seeds)
        for index in range(count):
            parent = random.choice(corpus if random.random() < 0.6 else seeds)
            case = _changed(subject, random, parent, random.choice(corpus)) or {}
            if not 0 < _size(case) <= _MAX_CASE_BYTES:
                case = subject.change(random, random.choice(seeds), random.choice(seeds))
            clear(path)
            place(case, path)
            before = lines.count
            outcome, problem, seconds = problem_of(path / subject.main(case))
            counts["findings" if outcome == "finding" else outcome] += 1
            slowest = max(slowest, seconds)
            if problem is not None:
                report({"finding": problem, "index": index})
            elif lines.count > before:
                corpus.append(case)
                # The oldest of the found ones go first; the seeds stay.
                if len(corpus) > _MAX_CORPUS:
                    del corpus[len(seeds)]
    report(
        {
            "done": count,
            **counts,
            "corpus": len(corpus) - len(seeds),
            "lines": lines.count,
            "slowest_seconds": round(slowest, 3),
            "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        }
    )


def _too_slow(*_: object) -> None:
    raise TooSlow


def _virtual_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    return pages * resource.getpagesize()


def main() -> None:
    """Run as a process of its own, by `tests.fuzz.run`."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--format", choices=sorted(SUBJECTS), required=True)
    parser.add_argument("--count", type=int, required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--folder", type=Path, required=True)
    arguments = parser.parse_args()

    def report(line: dict[str, Any]) -> None:
        if "finding" in line:
            _keep(arguments.folder, line)
        print(json.dumps(line), flush=True)

    faulthandler.enable()
    fuzz(arguments.format, arguments.count, arguments.seed, arguments.folder, report)
    sys.exit(0)


def _keep(folder: Path, line: dict[str, Any]) -> None:
    """Copy the input of a finding aside, once for each last line of a problem."""
    import shutil

    last = [part for part in str(line["finding"]).splitlines() if part.strip()]
    where = next((part.strip() for part in reversed(last) if part.strip().startswith("File")), "")
    line["key"] = f"{where}: {last[-1][:160]}"
    target = folder / "findings" / f"{abs(hash_of(line['key'])):012x}"
    if not target.exists():
        shutil.copytree(
            folder / "case", target, symlinks=True, ignore_dangling_symlinks=True, copy_function=_copy
        )
        (target / "PROBLEM").write_text(str(line["finding"]))
    line["kept"] = str(target)


def _copy(source: str, target: str) -> None:
    """Copy what is a file."""
    if Path(source).is_file():
        Path(target).write_bytes(Path(source).read_bytes())


def hash_of(text: str) -> int:
    """A number that names a problem, the same in each process."""
    import zlib

    return zlib.crc32(text.encode())


if __name__ == "__main__":
    main()
