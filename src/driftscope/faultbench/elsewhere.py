"""Faults where none of our code computes: a patched transformers model, a GGUF file run by llama.cpp."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from driftscope.analysis.floors import Floors
from driftscope.artifacts.model import Artifact
from driftscope.engines.available import EXTRAS, missing_module
from driftscope.engines.trace import Trace
from driftscope.faultbench import gguf_files, torch_modules
from driftscope.faultbench.examine import effect, examine, kl_nats
from driftscope.faultbench.gguf_files import GgufFault
from driftscope.faultbench.injection import Spot
from driftscope.faultbench.result import Setting, judged, not_run
from driftscope.faultbench.subjects import DEFAULT, Subject, Workbench
from driftscope.faultbench.torch_modules import TorchFault
from driftscope.forward.policy import WHOLE_MODEL

Result = dict[str, Any]

REGIME = "short"


def why_not(engine: str) -> str | None:
    """Why an engine cannot run here, or None."""
    module = missing_module(engine)
    return f"{module} is not installed; {EXTRAS[engine].install}" if module else None


class Elsewhere:
    """Runs faults in engines of others."""

    def __init__(self, bench: Workbench, floors: Floors, *, threads: int = 1) -> None:
        """Prepare."""
        self._bench = bench
        self._floors = floors
        self._threads = threads
        self._clean: dict[tuple[str, str, str], Any] = {}

    def transformers(self, model: str) -> Iterator[Result]:
        """One row for each patch of `torch_modules.FAULTS`."""
        reason = why_not("transformers")
        own = self._bench.artifact(model)
        layer = self._bench.site(Subject(model)).layer
        for fault in torch_modules.FAULTS:
            setting = _setting(fault, "transformers", model, "F32", "f32")
            if reason:
                yield not_run(setting, "not-run", reason)
                continue
            if absent := fault.unless(own.config):
                yield not_run(setting, "not-applicable", absent)
                continue
            clean = self._sound("transformers", model, "F32")
            with tempfile.TemporaryDirectory() as folder:
                trace = self.torch_trace(model, fault, layer, Path(folder))
                yield self._row(setting, _shown(fault.first(layer), own), fault.classes, trace, own, clean)

    def llama_cpp(self) -> Iterator[Result]:
        """One row for each edit of `gguf_files.FAULTS`."""
        reason = why_not("llama.cpp")
        for fault in gguf_files.FAULTS:
            setting = _setting(fault, "llama.cpp", fault.model, fault.scheme, "int8-dot")
            if reason:
                yield not_run(setting, "not-run", reason)
                continue
            source = self._bench.file(fault.model, fault.scheme)
            own = self._bench.artifact(fault.model, fault.scheme)
            layer = self._bench.site(Subject(fault.model)).layer
            clean = self._sound("llama.cpp", fault.model, fault.scheme)
            with tempfile.TemporaryDirectory() as folder:
                file = gguf_files.edited(source, Path(folder) / "edited.gguf", fault, layer)
                trace = self.llama_trace(file, fault.model, Path(folder) / "trace")
                yield self._row(setting, _shown(fault.first(layer), own), fault.classes, trace, own, clean)

    def torch_trace(
        self,
        model: str,
        fault: TorchFault | None,
        layer: int,
        out: Path | None = None,
        *,
        regime: str = REGIME,
        seed: int = 0,
        **options: Any,
    ) -> Trace:
        """A trace of transformers, patched or not."""
        from driftscope.engines import transformers

        chosen = transformers.TransformersOptions(threads=self._threads, **options)
        source = self._bench.artifact(model, "F32", seed)
        loaded = transformers.load(
            source.path, threads=self._threads, dtype=chosen.dtype, attention=chosen.attention
        )
        if fault is not None:
            fault.patch(loaded, layer)
        prompts = self._bench.prompts(model, regime, seed)
        return transformers.trace(source.path, prompts, out or self._scratch(), chosen, model=loaded)

    def llama_trace(
        self, file: Path, model: str, out: Path | None = None, *, regime: str = REGIME, **options: Any
    ) -> Trace:
        """A trace of llama.cpp."""
        from driftscope.engines import llama_cpp
        from driftscope.engines.llama_cpp_session import LlamaCppOptions

        chosen = LlamaCppOptions(threads=self._threads, **options)
        return llama_cpp.trace(file, self._bench.prompts(model, regime), out or self._scratch(), chosen)

    def _scratch(self) -> Path:
        return Path(tempfile.mkdtemp(dir=self._bench.folder))

    def _sound(self, engine: str, model: str, scheme: str) -> Any:
        """Logits of an engine without a fault."""
        key = (engine, model, scheme)
        if key not in self._clean:
            if engine == "llama.cpp":
                trace = self.llama_trace(self._bench.file(model, scheme), model)
            else:
                trace = self.torch_trace(model, None, 0)
            self._clean[key] = trace.tap(WHOLE_MODEL, "lm_head")
        return self._clean[key]

    def _row(
        self,
        setting: Setting,
        spot: Spot,
        classes: tuple[str, ...],
        trace: Trace,
        own: Artifact,
        clean: Any,
    ) -> Result:
        finding = examine(trace, own, None, self._floors, threads=self._threads)
        kl = kl_nats(clean, trace.tap(WHOLE_MODEL, "lm_head"))
        size = effect(finding.rows, spot, "engine", self._floors, trace.manifest.arithmetic, kl)
        return judged(setting, spot, classes, finding, size)


def _shown(spot: Spot, own: Artifact) -> Spot:
    """Where q, k and v have no bias, their product is what transformers shows."""
    unbiased = spot.tap == "qkv_bias" and not own.config.attention_bias
    return replace(spot, tap="qkv_matmul") if unbiased else spot


def _setting(fault: TorchFault | GgufFault, source: str, model: str, scheme: str, path: str) -> Setting:
    return Setting(
        fault=fault.fault,
        injection=fault.name,
        says=fault.says,
        mechanism="engine" if source == "transformers" else "file",
        judged="engine",
        source=source,
        model=model,
        format=scheme,
        path=path,
        regime=REGIME,
    )


TORCH_MODELS = ("qwen2-square",)
TORCH_MODELS_WITH_DEFAULT = (*TORCH_MODELS, DEFAULT)
