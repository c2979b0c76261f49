"""A recorder for the modules of any PyTorch model (extra ``transformers``, for torch)."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from driftscope.engines.hooks import INPUT, OUTPUT, hooks, host_copy
from driftscope.engines.trace import (
    RAGGED,
    Trace,
    TraceManifest,
    TraceWriter,
    is_prompt_id,
    is_tap,
)
from driftscope.errors import InputError
from driftscope.forward.architecture import LAYER_TAPS, WHOLE_TAPS, tap_name
from driftscope.forward.policy import WHOLE_MODEL

if TYPE_CHECKING:
    from driftscope.forward.arithmetic import Arithmetic

F32 = NDArray[np.float32]

_FIELD = "{layer}"


class Recorder:
    """Records what modules are given or give, pass by pass, and writes a trace::

        taps = {"model.layers.{layer}.mlp.down_proj": "ffn_out", "model.norm": "final_norm"}
        with Recorder(model, taps, out=folder, prompts=[("hello", ids)]) as recorder:
            model(torch.tensor([ids]))
        recorder.trace.tap(0, "ffn_out")

    Each call of `model` within the context is one prompt, in their order. Arrays are written as soon as the
    pass has gone on to another layer. The hooks come off at the end, also after an exception; then, no trace
    is finished.

    Attributes:
        trace: the trace, once the context was left.
    """

    trace: Trace

    def __init__(
        self,
        model: Any,
        taps: Mapping[str, str],
        *,
        out: Path,
        prompts: Sequence[tuple[str, Sequence[int]]],
        engine: Mapping[str, Any] | None = None,
        about: Mapping[str, Any] | None = None,
        arithmetic: Arithmetic | None = None,
        capture_points: Mapping[str, str] | None = None,
    ) -> None:
        """Prepare to record.

        Args:
            model: a ``torch.nn.Module``.
            taps: path of a module to the tap that its output is, ``{layer}`` standing for the layer's
                number; ``path:input`` for its first argument. A part of q, k and v is ``qkv_bias.q``.
                Outputs are ``[1, t, channels]`` or ``[t, channels]``; of scores and softmax
                ``[1, heads, t, t]`` or ``[heads, t, t]``.
            out: folder of the trace.
            prompts: id and token ids of each pass.
            engine: ``name``, and as far as known ``version`` and ``options``.
            about: what is known of the model: ``file``, ``sha256``, ``architecture``.
            arithmetic: what it computes in, where that is known.
            capture_points: what the taps hold where it is not what `driftscope.forward.architecture` says.

        Raises:
            InputError: a path that no module has, a tap that cannot be one, or a prompt's id that is none.
        """
        self._prompts = tuple((prompt, tuple(int(token) for token in ids)) for prompt, ids in prompts)
        for prompt, _ in self._prompts:
            if not is_prompt_id(prompt):
                raise InputError(f"recorder: prompt id {prompt!r}; expected printable text without brackets")
        self._manifest = TraceManifest(
            self._prompts, engine or {"name": "pytorch"}, about or {}, arithmetic, capture_points or {}
        )
        # Fails here where a prompt is empty or an id is none.
        self._lengths = [tokens.stop - tokens.start for tokens in self._manifest.batch.slices]
        self._model = model
        self._watched = [found for path, tap in taps.items() for found in _matches(model, path, tap)]
        self._out = out
        self._stack = ExitStack()
        self._current = -1
        self._inside = False
        self._arrays: dict[str, F32] = {}
        # pass, layer and tap of what came
        self._seen: set[tuple[int, int, str]] = set()
        self._layer = WHOLE_MODEL
        self._files = 0

    def __enter__(self) -> Recorder:
        """Begin to watch."""
        self._writer = TraceWriter(self._out)
        watch = self._stack.enter_context(hooks())
        watch(self._model, INPUT, self._begin)
        for module, side, layer, tap in self._watched:
            watch(module, side, partial(self._take, layer, tap))
        watch(self._model, OUTPUT, self._end)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        """Let go of the modules and, where nothing went wrong, finish the trace."""
        self._stack.close()
        if error is not None:
            return
        if self._current + 1 != len(self._prompts):
            raise InputError(
                f"recorder: the model ran {self._current + 1} times; expected {len(self._prompts)}, "
                "once a prompt"
            )
        passes = Counter((layer, tap) for _, layer, tap in self._seen)
        absent = {
            tap.partition(".")[0]: "its module did not run in every pass"
            for _, _, layer, tap in self._watched
            if passes[layer, tap] < len(self._prompts)
        }
        self.trace = self._writer.finish(replace(self._manifest, absent=absent))

    def _begin(self, given: Any) -> None:
        self._current += 1
        if self._current >= len(self._prompts):
            raise InputError(f"recorder: the model ran more than {len(self._prompts)} times, once a prompt")
        self._inside = True
        prompt, ids = self._prompts[self._current]
        is_ids = hasattr(given, "is_floating_point") and not given.is_floating_point()
        if is_ids and given.flatten().tolist() != list(ids):
            raise InputError(
                f"recorder: the model was given other tokens than those of the prompt {prompt!r}"
            )

    def _end(self, _: Any) -> None:
        self._write()
        self._inside = False

    def _take(self, layer: int, tap: str, tensor: Any) -> None:
        if not self._inside:
            return
        prompt, length = self._prompts[self._current][0], self._lengths[self._current]
        name = tap_name(layer, tap)
        array = host_copy(tensor)
        dims = 3 if tap in RAGGED else 2
        if array.ndim == dims + 1 and array.shape[0] == 1:
            array = array[0]
        if array.ndim != dims or array.shape[dims - 2] != length:
            raise InputError(
                f"recorder: {name} has the shape {list(array.shape)} in the prompt {prompt!r} of {length} "
                "tokens"
            )
        if layer != self._layer:
            self._write()
            self._layer = layer
        if (self._current, layer, tap) in self._seen:
            raise InputError(f"recorder: the module of {name} ran twice in one pass; expected once")
        self._seen.add((self._current, layer, tap))
        self._arrays[f"{name}[{prompt}]"] = array

    def _write(self) -> None:
        self._writer.write(f"pass-{self._current:04d}.{self._files:04d}", self._arrays)
        self._files += 1
        self._arrays.clear()


def _matches(model: Any, path: str, tap: str) -> Iterator[tuple[Any, str, int, str]]:
    """Module, side, layer and tap of every module that a path stands for."""
    stem, colon, side = path.partition(":")
    name, _, part = tap.partition(".")
    if not is_tap(0 if _FIELD in stem else WHOLE_MODEL, name, part):
        known = LAYER_TAPS if _FIELD in stem else WHOLE_TAPS
        raise InputError(
            f"recorder: {tap!r} is not a tap {'of a layer' if _FIELD in stem else 'of the whole model'}; "
            f"expected one of {', '.join(known)}"
        )
    if (colon and side != INPUT) or stem.count(_FIELD) > 1:
        raise InputError(f"recorder: {path!r} is no path; expected module or module:{INPUT}, {_FIELD} once")
    pattern = re.compile(re.escape(stem).replace(re.escape(_FIELD), "(0|[1-9][0-9]*)"))
    found = [
        (module, match)
        for name, module in model.named_modules()
        if name and (match := pattern.fullmatch(name))
    ]
    if not found:
        raise InputError(f"recorder: no module of {type(model).__name__} is called {stem}")
    for module, match in found:
        layer = int(match[1]) if match.lastindex else WHOLE_MODEL
        yield module, side or OUTPUT, layer, tap
