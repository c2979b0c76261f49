"""What the workflow must know of a case before it runs: files, digests and jobs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from driftscope.artifacts.lock import check, lock_path, read_lock
from driftscope.config import ENGINE_PATHS, Config, parse_config
from driftscope.contracts import commands
from driftscope.contracts.loading import ContractFile, load_contracts
from driftscope.contracts.model import Falsifier, gate_sha256, judgement_sha256, measurement_sha256
from driftscope.engines.available import EXTRAS, installed_versions, missing_module
from driftscope.errors import InputError
from driftscope.evidence.atomic import write_text
from driftscope.evidence.digest import sha256_file, sha256_json
from driftscope.falsifiers.reader import manifest_of
from driftscope.falsifiers.registry import ON_DEVICE


@dataclass(frozen=True)
class CasePlan:
    """One case, as the workflow's rules need it.

    Attributes:
        config: the validated configuration.
        results: the case's results folder, relative to the working folder.
        resolved: the configuration as JSON, overrides included, which every job reads.
        contracts: the folder of contracts.
        loaded: its contracts.
    """

    config: Config
    results: str
    resolved: str
    contracts: str
    loaded: tuple[ContractFile, ...]

    @property
    def fetched(self) -> list[str]:
        """Return the ids of the models that are fetched."""
        return sorted(self.config.sources())

    @property
    def derived(self) -> list[str]:
        """Return the ids of the models that are derived."""
        return sorted(set(self.config.models) - set(self.config.sources()))

    @property
    def falsifiers(self) -> list[str]:
        """Return the ids of all registered falsifiers."""
        return [falsifier.id for item in self.loaded for falsifier in item.contract.falsifiers]

    @property
    def gpus(self) -> int:
        """Return how many GPUs a job asks for whose kernels a GPU can run."""
        return 0 if self.config.device == "cpu" else 1

    @property
    def engines(self) -> dict[str, str]:
        """Return the engines that are traced, with their paths: asked for, installed, and fit for a model."""
        return {
            engine: ENGINE_PATHS[engine] for engine in self.config.trace.engines if not self._why_not(engine)
        }

    @property
    def engines_not_run(self) -> list[dict[str, str]]:
        """Return the engines that the configuration names and that cannot run here: why, and the remedy."""
        return [
            {"path": ENGINE_PATHS[engine], "engine": engine, **self._why_not(engine)}
            for engine in self.config.trace.engines
            if self._why_not(engine)
        ]

    def engine_versions(self, engine: str) -> str:
        """Return the versions of an engine's packages, so that a run is made anew with another."""
        return sha256_json(installed_versions(engine))

    def _why_not(self, engine: str) -> dict[str, str]:
        role = ENGINE_PATHS[engine].partition(".")[0]
        model = self.config.pair.model_dump()[role]
        wanted = {"llama.cpp": "a GGUF file", "transformers": "a safetensors folder"}[engine]
        if self.config.container(model) != {"llama.cpp": "gguf", "transformers": "safetensors"}[engine]:
            return {"reason": f"{engine} reads {wanted}, and the {role} `{model}` is none", "install": ""}
        if module := missing_module(engine):
            reason = f"{engine} is not installed (no module {module})"
            return {"reason": reason, "install": EXTRAS[engine].install}
        return {}

    @property
    def prompt_files(self) -> list[str]:
        """Return the text files that prompts are read from."""
        prompts = (*self.config.trace.prompts, *self.config.decomposition.texts)
        return sorted(
            {str(self.config.folder / prompt.file) for prompt in prompts if prompt.file is not None}
        )

    @property
    def prompt_specs(self) -> str:
        """Return the digest of the configured prompts."""
        document = self.config.canonical()
        return sha256_json([document["trace"]["prompts"], document["decomposition"]["texts"]])

    @property
    def resampling(self) -> str:
        """Return the digest of how shares and intervals are made."""
        return sha256_json(self.config.decomposition.model_dump(mode="json", exclude={"texts", "jobs"}))

    @property
    def gates_digest(self) -> str:
        """Return the digest of all gates."""
        return sha256_json([gate_sha256(gate) for item in self.loaded for gate in item.contract.gates])

    @property
    def published_digest(self) -> str:
        """Return the digest of the published figures."""
        files = sorted((Path(self.contracts) / "published").glob("*.yaml"))
        return sha256_json([[file.name, sha256_file(file)] for file in files])

    def pin(self, model: str) -> str:
        """Return what a fetched model is pinned to.

        Raises:
            InputError: it is not locked, or is locked to another source.
        """
        path = lock_path(Path(self.config.origin))
        entry = check(read_lock(path), model, self.config.sources()[model], path)
        return sha256_json(entry.model_dump(mode="json"))

    def local_files(self, model: str) -> list[str]:
        """Return the files of a ``file:`` source, so that a change of them is noticed."""
        source = self.config.sources()[model]
        if not source.startswith("file:"):
            return []
        path = self.config.folder / source.removeprefix("file:")
        return (
            [str(path)] if path.is_file() else sorted(str(file) for file in path.glob("*") if file.is_file())
        )

    def derivation(self, model: str) -> str:
        """Return the digest of how a model is derived."""
        return sha256_json(self.config.models[model].model_dump(mode="json", by_alias=True))

    def contract_file(self, falsifier: str) -> str:
        """Return the contract file that registers a falsifier."""
        return str(self._find(falsifier)[0].file)

    def measurement_digest(self, falsifier: str) -> str:
        """Return the digest of all that a falsifier's measurement reads of its contract."""
        return measurement_sha256(self._find(falsifier)[1])

    def judgement_digest(self, falsifier: str) -> str:
        """Return the digest of all that a falsifier's judgement reads of its contract."""
        item, found = self._find(falsifier)
        return sha256_json([judgement_sha256(found), item.contract.id, item.contract.version])

    def measurement_inputs(self, falsifier: str) -> list[str]:
        """Return the evidence files that a falsifier's measurement reads."""
        pair = self.config.pair.model_dump()
        names = commands.measurement_inputs(self._find(falsifier)[1])
        return [f"{self.results}/{manifest_of(name, pair)}" for name in names]

    def measurement_device(self, falsifier: str) -> str:
        """Return the device that a falsifier's measurement is to use; a setting that it ignores is cpu."""
        _, found = self._find(falsifier)
        return self.config.device if found.measurement.name in ON_DEVICE else "cpu"

    def measurement_gpus(self, falsifier: str) -> int:
        """Return how many GPUs a falsifier's measurement asks for."""
        return 0 if self.measurement_device(falsifier) == "cpu" else 1

    def _find(self, falsifier: str) -> tuple[ContractFile, Falsifier]:
        for item in self.loaded:
            for found in item.contract.falsifiers:
                if found.id == falsifier:
                    return item, found
        raise InputError(f"{self.contracts}: no falsifier `{falsifier}`")


def plan_case(values: Mapping[str, Any], files: Sequence[str | Path], workflow_folder: Path) -> CasePlan:
    """Validate what Snakemake read and lay the case out.

    Args:
        values: Snakemake's configuration, overrides included.
        files: the configuration files it was read from; the last one owns relative paths and the lock.
        workflow_folder: where the Snakefile is.

    Raises:
        InputError: the configuration or a contract is not valid.
    """
    origin = _from_here(files[-1]) if files else "config/config.yaml"
    config = parse_config(dict(values), origin)
    if not config.origin:
        config = config.model_copy(update={"origin": origin})
    results = f"results/{config.name}"
    contracts = Path(config.contracts)
    folder = contracts if contracts.is_absolute() or contracts.is_dir() else workflow_folder / contracts
    loaded = tuple(load_contracts([folder]))
    resolved = Path(results) / "config.json"
    plan = CasePlan(config, results, str(resolved), str(folder), loaded)
    for model in plan.fetched:
        plan.pin(model)
    text = json.dumps({**config.canonical(), "origin": config.origin}, indent=1) + "\n"
    # Every job reads this file, so that overrides reach them; it is no rule's input.
    if not resolved.is_file() or resolved.read_text(encoding="utf-8") != text:
        write_text(resolved, text)
    return plan


def _from_here(path: str | Path) -> str:
    """Return a path relative to the working folder if it is below it.

    Snakemake gives a ``--configfile`` as an absolute path and the Snakefile's own as it is written there;
    the inputs named by it must be the same either way, or the one run after the other would begin anew.
    """
    absolute = Path(path).absolute()
    return str(absolute.relative_to(Path.cwd())) if absolute.is_relative_to(Path.cwd()) else str(path)
