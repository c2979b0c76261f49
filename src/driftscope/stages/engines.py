"""Traces of engines that are not ours, for the case's prompts."""

from __future__ import annotations

from pathlib import Path

from driftscope.errors import InputError
from driftscope.evidence.manifest import open_model
from driftscope.stages.prompts import prompt_set

# Sums of both engines depend on the number of threads in the last bits.
_THREADS = 1


def run(engine: str, model: Path, prompts_file: Path, out: Path) -> None:
    """Trace an engine over the prompts.

    Args:
        engine: ``llama.cpp`` or ``transformers``.
        model: manifest of the artifact that it runs.
        prompts_file: the encoded prompts.
        out: the trace's ``trace.json``.

    Raises:
        InputError: no such engine, not installed, or the engine refuses the model.
    """
    artifact, _ = open_model(model)
    prompts = [(prompt["id"], prompt["ids"]) for prompt in prompt_set(prompts_file, "trace")[0]]
    if engine == "llama.cpp":
        from driftscope.engines import llama_cpp

        llama_cpp.trace(artifact.path, prompts, out.parent, llama_cpp.LlamaCppOptions(threads=_THREADS))
    elif engine == "transformers":
        from driftscope.engines import transformers

        options = transformers.TransformersOptions(threads=_THREADS)
        transformers.trace(artifact.path, prompts, out.parent, options)
    else:
        raise InputError(f"engine {engine!r} is unknown; expected llama.cpp or transformers")
