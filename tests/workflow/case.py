"""A whole case on a generated model of 256 channels: its folder, and ways to run the workflow in it."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import yaml
from numpy.typing import NDArray
from tests.helpers.tiny_gguf import write_gguf

ROOT = Path(__file__).parents[2]
NAME = "tiny"
MODEL = "config/models/tiny.gguf"
LAYERS, HIDDEN, INNER, HEADS, KV_HEADS, CONTEXT = 2, 256, 256, 4, 2, 96
BYTES = 256
VOCAB = BYTES + 3
TEXT = "The tide comes in twice a day, and the harbour master writes down when. "

CONFIG: dict[str, Any] = {
    "name": NAME,
    "title": "A generated model against its Q4_K_M",
    "models": {
        "source": {"source": "file:models/tiny.gguf"},
        "teacher": {"derive": "teacher", "from": "source", "dtype": "F32"},
        "candidate": {"derive": "candidate", "from": "teacher", "scheme": "Q4_K_M"},
    },
    "pair": {"teacher": "teacher", "candidate": "candidate"},
    "sweep": {"shards": 2},
    "trace": {
        "chunks": 2,
        "engines": ["llama.cpp", "transformers"],
        "prompts": [
            {"id": "short", "text": "Two and two"},
            {"id": "long", "text": "A longer line of text."},
        ],
    },
    "decomposition": {
        "jobs": 2,
        "minimum_positions": 32,
        "block_positions": 8,
        "resamples": 200,
        "seed": 3,
        "texts": [{"id": "tide", "file": "texts/tide.txt"}, {"id": "said", "text": "Nothing was said."}],
    },
}


def tiny_model_tensors(seed: int = 0) -> dict[str, NDArray[np.float32]]:
    """GGUF name to values; the scales keep the residual stream near one."""
    random = np.random.Generator(np.random.Philox(seed))
    head_rows = HIDDEN // HEADS * KV_HEADS
    block = {
        "attn_norm.weight": (HIDDEN,),
        "attn_q.weight": (HIDDEN, HIDDEN),
        "attn_k.weight": (head_rows, HIDDEN),
        "attn_v.weight": (head_rows, HIDDEN),
        "attn_output.weight": (HIDDEN, HIDDEN),
        "ffn_norm.weight": (HIDDEN,),
        "ffn_gate.weight": (INNER, HIDDEN),
        "ffn_up.weight": (INNER, HIDDEN),
        "ffn_down.weight": (HIDDEN, INNER),
    }
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (VOCAB, HIDDEN)}
    shapes |= {f"blk.{layer}.{name}": shape for layer in range(LAYERS) for name, shape in block.items()}
    shapes |= {"output_norm.weight": (HIDDEN,), "output.weight": (VOCAB, HIDDEN)}
    return {
        name: (
            1 + 0.1 * random.standard_normal(shape, dtype=np.float32)
            if len(shape) == 1
            else random.standard_normal(shape, dtype=np.float32) / np.float32(np.sqrt(HIDDEN))
        ).astype(np.float32)
        for name, shape in shapes.items()
    }


def add_keys(writer: gguf.GGUFWriter) -> None:
    """Hyperparameters and a vocabulary of bytes with two merges."""
    writer.add_block_count(LAYERS)
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    tokens = [*_byte_letters(), "<|end|>", "th", "Ġth"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * BYTES + [3, 1, 1])
    writer.add_token_merges(["t h", "Ġ th"])
    writer.add_bos_token_id(BYTES)
    writer.add_eos_token_id(BYTES)


def _byte_letters() -> list[str]:
    """The letter that stands for each byte in a byte-level vocabulary (Radford et al. 2019)."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte if byte in plain else next(others)) for byte in range(BYTES)]


def write_model(path: Path, tensors: dict[str, NDArray[np.float32]] | None = None, **options: Any) -> Path:
    """Write the generated model, or one of other tensors or keys."""
    path.parent.mkdir(parents=True, exist_ok=True)
    options.setdefault("keys", add_keys)
    return write_gguf(path, options.pop("architecture", "llama"), tensors or tiny_model_tensors(), **options)


def _without_one_block(folder: str, _names: list[str]) -> list[str]:
    """The contract to leave out, but not the published figures of the same name."""
    return ["one-block.yaml"] if Path(folder).name == "contracts" else []


class Case:
    """A folder with a workflow, contracts, a configuration, a model and its lock."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.results = folder / "results" / NAME
        self.report = folder / "results" / f"{NAME}_report.json"

    @classmethod
    def create(cls, folder: Path) -> Case:
        """Lay out a case that has not run."""
        case = cls(folder)
        folder.mkdir(parents=True)
        shutil.copy2(ROOT / "Snakefile", folder)
        shutil.copytree(ROOT / "workflow", folder / "workflow")
        # Two measurements fewer to wait for; what they measure depends on no model.
        shutil.copytree(ROOT / "contracts", folder / "contracts", ignore=_without_one_block)
        write_model(folder / MODEL)
        (folder / "config/texts").mkdir()
        (folder / "config/texts/tide.txt").write_text(TEXT, encoding="utf-8")
        case.configure()
        case.lock()
        return case

    def copy(self, folder: Path) -> Case:
        """Copy the case with its times, which the workflow looks at."""
        shutil.copytree(self.folder, folder, symlinks=True)
        for link in (folder / "results").rglob("*"):
            # A fetched file is a link to the user's own, which here is the copy's.
            if link.is_symlink() and link.readlink().is_relative_to(self.folder):
                target = folder / link.readlink().relative_to(self.folder)
                link.unlink()
                link.symlink_to(target)
        return Case(folder)

    def configure(self, **sections: Any) -> None:
        """Write the configuration, with other sections where given."""
        text = yaml.safe_dump({**CONFIG, **sections}, sort_keys=False)
        (self.folder / "config/config.yaml").write_text(text, encoding="utf-8")

    def lock(self) -> None:
        """Pin the model file as it is now."""
        done = self.driftscope("lock", "config/config.yaml")
        assert done.returncode == 0, done.stderr

    def edit(self, file: str, old: str, new: str) -> None:
        """Replace the one place where `old` stands in a file."""
        path = self.folder / file
        text = path.read_text(encoding="utf-8")
        assert text.count(old) == 1, f"{file}: {old!r} stands {text.count(old)} times"
        path.write_text(text.replace(old, new), encoding="utf-8")

    def driftscope(self, *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
        """Run the command line in the case's folder."""
        return self._call("driftscope.cli", arguments, **options)

    def snakemake(self, *arguments: str, cores: int = 2, **options: Any) -> subprocess.CompletedProcess[str]:
        """Run Snakemake in the case's folder."""
        # The default profile hides which rules run.
        profile = ("--workflow-profile", "none")
        return self._call("snakemake", ("--cores", str(cores), *profile, *arguments), **options)

    def run(self, cores: int = 2) -> subprocess.CompletedProcess[str]:
        """Run the workflow as a user does."""
        return self.driftscope("run", "--cores", str(cores))

    def environment(self) -> dict[str, str]:
        """The environment of a run: the commands of this interpreter come first."""
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        # A terminal's width must not wrap messages.
        return {**os.environ, "PATH": path, "COLUMNS": "1000"}

    def _call(
        self, module: str, arguments: tuple[str, ...], **options: Any
    ) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", module, *arguments]
        return subprocess.run(
            command,
            cwd=self.folder,
            env=self.environment(),
            capture_output=True,
            text=True,
            check=False,
            timeout=600,
            **options,
        )

    def evidence(self) -> dict[str, str]:
        """Digest of every file that must repeat: all evidence, derived models and the report.

        A fetched model is a link to the user's own file, which the tests change.
        """
        found = {}
        for path in sorted((self.folder / "results").rglob("*")):
            name = path.relative_to(self.folder).as_posix()
            if path.is_file() and not path.is_symlink() and not _VARIES.search(name):
                found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        return found


_VARIES = re.compile(r"\.provenance\.json$|/logs/|/benchmarks/|/config\.json$")


def jobs_run(done: subprocess.CompletedProcess[str]) -> Counter[str]:
    """How often each rule ran, but for the target rule that does nothing."""
    found = Counter(re.findall(r"^(?:local)?rule (\w+):$", done.stdout + done.stderr, re.MULTILINE))
    del found["all"]
    return found


def jobs_planned(done: subprocess.CompletedProcess[str]) -> dict[str, int]:
    """How often each rule would run, by the table at the end of a dry run."""
    table = (done.stdout + done.stderr).rpartition("Job stats:")[2]
    found = {name: int(count) for name, count in re.findall(r"^(\w+) +(\d+)$", table, re.MULTILINE)}
    return {name: count for name, count in found.items() if name not in ("all", "total")}


def one_line(done: subprocess.CompletedProcess[str]) -> str:
    """The line that a command or a run ends with for bad input, after checking that it gives no other."""
    assert done.returncode == 2, done.stdout + done.stderr
    line = done.stderr.rstrip("\n").rpartition("\n")[2]
    said = re.findall(r"^driftscope: .*$", done.stdout + done.stderr, re.MULTILINE)
    assert line.startswith("driftscope: "), done.stderr
    # Rules that fail side by side may each have said it in their logs, which a run shows.
    assert set(said) == {line}, done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    return line.removeprefix("driftscope: ")
