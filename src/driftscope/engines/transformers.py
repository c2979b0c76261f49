"""Hugging Face transformers as an engine (extra ``transformers``)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from driftscope.artifacts.files import is_folder
from driftscope.engines.available import EXTRAS
from driftscope.errors import InputError
from driftscope.forward.batch import TokenBatch

if TYPE_CHECKING:
    from collections.abc import Iterator

    from driftscope.engines.trace import Trace

F32 = NDArray[np.float32]

NAME = "transformers"

Prompts = Sequence[tuple[str, Sequence[int]]]
"""Prompt id and token ids."""

_INSTALL = f"install it with: {EXTRAS[NAME].install}"
_DTYPES = {"f32": "float32", "bf16": "bfloat16", "f16": "float16"}
_CHOICES = {"dtype": tuple(_DTYPES), "attention": ("eager", "sdpa"), "device": ("cpu", "cuda")}


@dataclass(frozen=True)
class TransformersOptions:
    """How transformers runs.

    Attributes:
        dtype: of weights and activations: ``f32``, ``bf16`` or ``f16``.
        attention: ``eager``; or ``sdpa``, torch's fused attention, which gives no scores and no softmax.
        device: ``cpu`` or ``cuda``.
        threads: for torch on the CPU, whose sums depend on it in the last bits.
    """

    dtype: str = "f32"
    attention: str = "eager"
    device: str = "cpu"
    threads: int = 1

    def __post_init__(self) -> None:
        for key, choices in _CHOICES.items():
            if (value := getattr(self, key)) not in choices:
                raise InputError(
                    f"transformers: {key} {value!r} is unknown; expected one of {', '.join(choices)}"
                )
        if self.threads < 1:
            raise InputError(f"transformers: threads is {self.threads}; expected 1 or more")


def logits(folder: Path, batch: TokenBatch, *, threads: int = 1) -> F32:
    """Logits of every token, in float32 on the CPU, eager attention.

    Args:
        folder: a safetensors model with its config.json. Nothing is downloaded and no code of the
            folder is run.
        batch: token ids; each sequence is run on its own.
        threads: for torch, whose sums depend on it in the last bits.

    Returns:
        ``float32[n_tokens, vocabulary]``.

    Raises:
        InputError: torch or transformers is not installed, or transformers refuses the folder.
    """
    torch, _ = _modules()
    model = load(folder, threads=threads)
    out = np.empty((batch.n_tokens, model.config.vocab_size), dtype=np.float32)
    with torch.inference_mode():
        for tokens in batch.slices:
            ids = torch.tensor(batch.ids[tokens].astype(np.int64))[None]
            out[tokens] = model(ids, use_cache=False).logits[0].numpy()
    return out


def load(
    folder: Path, *, threads: int = 1, dtype: str = "f32", attention: str = "eager", device: str = "cpu"
) -> Any:
    """The model as a torch module, in evaluation mode; arguments as in `TransformersOptions`.

    Nothing is downloaded and no code of the folder is run.

    Raises:
        InputError: an unknown option, torch or transformers is not installed, no such device, or
            transformers refuses the folder or finds no weights for a part of the model.
    """
    options = TransformersOptions(dtype, attention, device, threads)
    torch, transformers = _modules()
    if options.device == "cuda" and not torch.cuda.is_available():
        raise InputError("transformers: device 'cuda' was asked for, but torch finds no CUDA device")
    if not is_folder(folder):
        # transformers would take the name for one of a model that it has in its cache.
        raise InputError(f"{folder}: not a folder; expected a safetensors model with its config.json")
    torch.set_num_threads(threads)
    bars = transformers.utils.logging
    shown = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        model, found = transformers.AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=getattr(torch, _DTYPES[dtype]),
            attn_implementation=attention,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
        )
    except Exception as error:
        # transformers passes on whatever its parts raise over a file that is not what they expect.
        raise InputError(f"{folder}: transformers cannot load the model: {_one_line(error)}") from error
    finally:
        if shown:
            bars.enable_progress_bar()
    # transformers would go on with random values.
    if missing := sorted(map(str, found.get("missing_keys", ()))):
        raise InputError(f"{folder}: transformers finds no weights for {missing[0]} ({len(missing)} in all)")
    return model.to(device).eval()


def trace(
    folder: Path,
    prompts: Prompts,
    out: Path,
    options: TransformersOptions = TransformersOptions(),
    *,
    model: Any = None,
    wanted: Callable[[int, str], bool] = lambda layer, tap: True,
    about: Mapping[str, Any] | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Trace:
    """Trace a model, with hooks that come off again.

    Each prompt is run on its own, from position 0 and without a cache. Values of bfloat16 and float16 are
    written as float32, which holds them.

    Args:
        folder: a safetensors model with its config.json.
        prompts: what is run.
        out: where the trace is written, one file for a prompt and a layer, so that no more than one layer's
            taps of one prompt are held.
        options: how it runs.
        model: the model where it is loaded already, perhaps with modules of the caller's own. It runs where
            it lies. An attention function that the caller registered stays; else ``options.attention``
            holds. `folder` then only gives the trace's model a name.
        wanted: whether a tap (layer, name) is kept.
        about: what else the manifest says of the model.
        progress: called with the layers done and their number, prompts times layers.

    Raises:
        InputError: as in `load`; a model whose modules are not where those of a supported architecture are;
            a model of another dtype than ``options.dtype``; a prompt with a token outside of the vocabulary.
    """
    from driftscope.engines.transformers_taps import layers_of, watched

    torch, _ = _modules()
    if model is None:
        model = load(folder, **asdict(options))
    where = str(folder)
    n_layers = len(layers_of(model, where))
    embedding = model.get_input_embeddings().weight
    if embedding.dtype != getattr(torch, _DTYPES[options.dtype]):
        raise InputError(f"{where}: the model has {embedding.dtype}; the options say {options.dtype}")
    taken = tuple((prompt, tuple(int(token) for token in ids)) for prompt, ids in prompts)
    largest = int(TokenBatch.of([ids for _, ids in taken]).ids.max())
    if largest >= embedding.shape[0]:
        raise InputError(
            f"{where}: token id {largest} is outside of the vocabulary of {embedding.shape[0]} tokens"
        )
    recording = _Recording(out, taken, n_layers, progress)
    with (
        _settings(torch, model, options) as attention,
        torch.inference_mode(),
        watched(model, where, recording.keep, recording.done, wanted),
    ):
        for _, ids in taken:
            model(torch.tensor([ids], dtype=torch.int64, device=embedding.device), use_cache=False)
            recording.next_prompt()
    described = {**asdict(options), "attention": attention, "device": str(embedding.device.type)}
    return recording.finish(model, described, {"file": folder.name, **(about or {})}, wanted)


class _Recording:
    """Writes the taps of one prompt and layer after another."""

    def __init__(
        self,
        out: Path,
        prompts: tuple[tuple[str, tuple[int, ...]], ...],
        n_layers: int,
        progress: Callable[[int, int], None],
    ) -> None:
        from driftscope.engines.trace import TraceWriter

        self._writer = TraceWriter(out)
        self._prompts = prompts
        self._n_layers = n_layers
        self._progress = progress
        self._current = 0
        self._arrays: dict[str, F32] = {}
        # tap to the prompts and layers that gave it
        self._seen: dict[str, set[tuple[int, int]]] = {}

    def keep(self, layer: int, tap: str, array: F32) -> None:
        from driftscope.forward.architecture import tap_name

        self._arrays[f"{tap_name(layer, tap)}[{self._prompts[self._current][0]}]"] = array
        self._seen.setdefault(tap.partition(".")[0], set()).add((self._current, layer))

    def done(self, layer: int) -> None:
        self._write(f"layer-{layer:03d}")
        self._progress(self._current * self._n_layers + layer + 1, len(self._prompts) * self._n_layers)

    def next_prompt(self) -> None:
        self._write("whole")
        self._current += 1

    def _write(self, name: str) -> None:
        self._writer.write(f"prompt-{self._current:04d}.{name}", self._arrays)
        self._arrays.clear()

    def finish(
        self,
        model: Any,
        options: Mapping[str, Any],
        about: Mapping[str, Any],
        wanted: Callable[[int, str], bool],
    ) -> Trace:
        from driftscope.artifacts.config import config_from_hf
        from driftscope.engines.trace import TraceManifest
        from driftscope.engines.transformers_taps import absent_reasons
        from driftscope.forward.architecture import embedding_op, head_ops, layer_ops
        from driftscope.forward.arithmetic import Arithmetic
        from driftscope.forward.policy import WHOLE_MODEL

        config = config_from_hf(model.config.to_dict(), str(about["file"]))
        reasons = absent_reasons(model, options["attention"])
        places = [(op, WHOLE_MODEL) for op in (embedding_op(config), *head_ops(config))]
        places += [(op, layer) for layer in range(self._n_layers) for op in layer_ops(config)]
        points: dict[str, str] = {}
        gaps: dict[str, list[int]] = {}
        for op, layer in places:
            seen = self._seen.get(op.tap, set())
            if seen:
                points[op.tap] = op.capture_point
            if wanted(layer, op.tap) and not {(i, layer) for i in range(len(self._prompts))} <= seen:
                gaps.setdefault(op.tap, []).append(layer)
        absent = {}
        for tap, layers in gaps.items():
            where = f" (layers {', '.join(map(str, layers))})" if tap in points else ""
            absent[tap] = reasons.get(tap, "the model does not compute it where it is looked for") + where
        manifest = TraceManifest(
            prompts=self._prompts,
            engine={"name": NAME, "version": version(), "options": dict(options)},
            model={"architecture": config.architecture, **about},
            arithmetic=Arithmetic.of("f32", dtype=options["dtype"]),
            capture_points=points,
            absent=absent,
        )
        return self._writer.finish(manifest)


@contextmanager
def _settings(torch: Any, model: Any, options: TransformersOptions) -> Iterator[str]:
    """Threads, attention and evaluation mode for one run; gives the name of the attention function."""
    threads, training = torch.get_num_threads(), model.training
    attention = model.config._attn_implementation
    own = attention in _CHOICES["attention"]
    try:
        torch.set_num_threads(options.threads)
        if training:
            model.eval()
        if own:
            model.set_attn_implementation(options.attention)
        yield options.attention if own else str(attention)
    finally:
        if own:
            model.set_attn_implementation(attention)
        if training:
            model.train()
        torch.set_num_threads(threads)


def version() -> dict[str, str]:
    """Versions of transformers and torch."""
    torch, transformers = _modules()
    return {"transformers": transformers.__version__, "torch": torch.__version__}


def _modules() -> tuple[Any, Any]:
    try:
        import torch
        import transformers
    except ImportError as error:
        raise InputError(f"transformers is not available ({error}); {_INSTALL}") from error
    return torch, transformers


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
