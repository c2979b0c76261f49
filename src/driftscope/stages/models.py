"""Models: fetch what a source names, derive one artifact from another."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from driftscope.config import Config, ModelSpec
from driftscope.errors import InputError
from driftscope.evidence.header import EvidenceHeader
from driftscope.evidence.manifest import open_model, write_manifest

Progress = Callable[[int, int], None]


def fetch(config: Config, model: str, manifest: Path, progress: Progress | None = None) -> None:
    """Bring the files of a model beside its manifest, as pinned by the configuration's lock file."""
    from driftscope.artifacts.complete import check_complete
    from driftscope.artifacts.files import following_links
    from driftscope.artifacts.lock import fetch_model
    from driftscope.artifacts.open import open_artifact

    source = _spec(config, model).source
    if source is None:
        raise InputError(f"{config.origin}: model `{model}` is derived, not fetched")
    fetched = fetch_model(model, source, Path(config.origin), manifest.parent / model, progress)
    with following_links():
        artifact = open_artifact(fetched.path)
    check_complete(artifact)
    pins = {file.name: file.sha256 for file in fetched.entry.files}
    header = EvidenceHeader.of("fetch", pins, {"source": source})
    origin = {
        "origin": "fetched",
        "source": source,
        "revision": fetched.entry.revision,
        "container": artifact.container,
        "architecture": artifact.config.architecture,
    }
    write_manifest(manifest, model, fetched.path, header, origin)


def derive(
    config: Config,
    model: str,
    from_manifest: Path,
    manifest: Path,
    *,
    threads: int,
    progress: Progress | None,
) -> None:
    """Write a model that is derived from another one."""
    spec = _spec(config, model)
    source, digest = open_model(from_manifest)
    folder = manifest.parent / model
    if spec.derive == "teacher":
        from driftscope.artifacts.derive.teacher import write_teacher

        write_teacher(source, folder, dtype=spec.dtype, progress=progress)
        path, container = folder, "safetensors"
        parameters = {"derive": "teacher", "dtype": spec.dtype}
    elif spec.derive == "candidate":
        from driftscope.artifacts.derive.candidate import write_candidate

        path, container = folder / f"{model}-{spec.scheme}.gguf", "gguf"
        write_candidate(source, path, scheme=spec.scheme, threads=threads, progress=progress)
        parameters = {"derive": "candidate", "scheme": spec.scheme}
    else:
        raise InputError(f"{config.origin}: model `{model}` is fetched, not derived")
    header = EvidenceHeader.of("derive", {str(spec.from_): digest}, parameters)
    origin = {
        "origin": "derived",
        "source": f"{spec.derive} of {spec.from_}"
        + (f", {spec.scheme}" if spec.derive == "candidate" else f", {spec.dtype}"),
        "revision": None,
        "container": container,
        "architecture": source.config.architecture,
    }
    write_manifest(manifest, model, path, header, origin)


def _spec(config: Config, model: str) -> ModelSpec:
    if model not in config.models:
        raise InputError(
            f"{config.origin}: no model `{model}`; configured are {', '.join(sorted(config.models))}"
        )
    return config.models[model]
