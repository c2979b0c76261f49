"""A model in llama.cpp and a context to run it in, through the low-level API of llama-cpp-python."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from driftscope.engines.available import EXTRAS
from driftscope.errors import InputError

NAME = "llama.cpp"

_INSTALL = f"install it with: {EXTRAS[NAME].install}"

KV_TYPES = {"f32": 0, "f16": 1, "bf16": 30, "q8_0": 8}
"""Types of the key-value cache to ggml's numbers of them."""

_ERROR_LEVEL = 4


@dataclass(frozen=True)
class LlamaCppOptions:
    """How llama.cpp runs.

    Attributes:
        kv_type: type of the key-value cache, one of `KV_TYPES`; ``f16`` is llama.cpp's default. ``q8_0``
            needs `flash_attention`.
        flash_attention: fused attention, which needs no score matrix but rounds differently.
        repack: let the CPU backend reorder quantized weights for its faster kernels.
        threads: for prompt processing and generation alike.
        batch_size: tokens that are computed at once, 0 for a whole sequence. Kernels are chosen by it: some
            faults show at two or three rows only.
    """

    kv_type: str = "f16"
    flash_attention: bool = False
    repack: bool = True
    threads: int = 1
    batch_size: int = 0

    def __post_init__(self) -> None:
        if self.kv_type not in KV_TYPES:
            raise InputError(
                f"llama.cpp: kv_type {self.kv_type!r} is unknown; expected one of {', '.join(KV_TYPES)}"
            )
        if self.kv_type == "q8_0" and not self.flash_attention:
            raise InputError("llama.cpp: kv_type q8_0 needs flash_attention: values are quantized only there")
        if self.threads < 1:
            raise InputError(f"llama.cpp: {self.threads} threads; expected at least 1")
        if self.batch_size < 0:
            raise InputError(f"llama.cpp: batch_size {self.batch_size}; expected 0 or more tokens")


class Session:
    """A model and a context on the CPU, freed on exit.

    Attributes:
        vocab_size: logits a token.
    """

    def __init__(
        self, api: Any, path: Path, n_tokens: int, options: LlamaCppOptions, callback: Any = None
    ) -> None:
        """Prepare a session.

        Args:
            api: `load_api`'s.
            path: a GGUF file.
            n_tokens: tokens of the longest sequence.
            options: how llama.cpp runs.
            callback: llama.cpp's ``cb_eval``, or None.
        """
        self.vocab_size = 0
        self._api, self._path, self._n_tokens = api, path, n_tokens
        self._batch_size = min(options.batch_size or n_tokens, n_tokens)
        self._options, self._callback = options, callback
        self._model = self._context = None

    def __enter__(self) -> Session:
        """Load the model.

        Raises:
            InputError: llama.cpp refuses the file or the options.
        """
        api, options = self._api, self._options
        _errors.clear()
        model_params = api.llama_model_default_params()
        model_params.n_gpu_layers = 0
        # None of the devices: a build with a GPU would run large products there.
        self._devices = (ctypes.c_void_p * 1)(None)
        model_params.devices = ctypes.addressof(self._devices)
        model_params.use_extra_bufts = options.repack
        self._model = api.llama_model_load_from_file(os.fsencode(self._path), model_params)
        if not self._model:
            raise InputError(f"{self._path}: llama.cpp cannot load the file{_said()}")
        self.vocab_size = int(api.llama_vocab_n_tokens(api.llama_model_get_vocab(self._model)))
        params = api.llama_context_default_params()
        params.n_ctx = self._n_tokens
        params.n_batch = params.n_ubatch = self._batch_size
        params.n_threads = params.n_threads_batch = options.threads
        params.flash_attn_type = (
            api.LLAMA_FLASH_ATTN_TYPE_ENABLED
            if options.flash_attention
            else api.LLAMA_FLASH_ATTN_TYPE_DISABLED
        )
        params.type_k = params.type_v = KV_TYPES[options.kv_type]
        params.offload_kqv = params.op_offload = False
        params.no_perf = True
        if self._callback is not None:
            params.cb_eval = self._callback
        self._context = api.llama_init_from_model(self._model, params)
        if not self._context:
            self.__exit__()
            raise InputError(
                f"{self._path}: llama.cpp cannot make a context of {self._n_tokens} tokens{_said()}"
            )
        return self

    def __exit__(self, *_: object) -> None:
        """Free the context and the model."""
        if self._context:
            self._api.llama_free(self._context)
        if self._model:
            self._api.llama_model_free(self._model)
        self._context = self._model = None

    def batches(self, n_tokens: int) -> Iterator[tuple[int, int]]:
        """First token, and the one after the last, of each batch of a sequence."""
        for begin in range(0, n_tokens, self._batch_size):
            yield begin, min(begin + self._batch_size, n_tokens)

    def decode(self, ids: NDArray[np.int32], begin: int, end: int) -> None:
        """Run tokens ``begin`` to ``end`` of a sequence; those before are in the cache.

        Every token has logits, so that llama.cpp leaves out no row of the last layer.

        Raises:
            InputError: llama.cpp refuses the tokens.
        """
        api, count = self._api, end - begin
        if begin == 0:
            api.llama_memory_clear(api.llama_get_memory(self._context), True)
        batch = api.llama_batch_init(count, 0, 1)
        try:
            batch.n_tokens = count
            for index in range(count):
                batch.token[index] = int(ids[begin + index])
                batch.pos[index] = begin + index
                batch.n_seq_id[index] = 1
                batch.seq_id[index][0] = 0
                batch.logits[index] = True
            _errors.clear()
            status = api.llama_decode(self._context, batch)
            if status:
                raise InputError(
                    f"{self._path}: llama.cpp cannot decode {count} tokens (status {status}){_said()}"
                )
        finally:
            api.llama_batch_free(batch)

    def logits(self, n_tokens: int) -> NDArray[np.float32]:
        """A view of the logits of the last `decode`, ``float32[n_tokens, vocab_size]``."""
        values = self._api.llama_get_logits(self._context)
        source = ctypes.cast(values, ctypes.POINTER(ctypes.c_float))
        return np.ctypeslib.as_array(source, shape=(n_tokens, self.vocab_size))


def load_api() -> Any:
    """The module ``llama_cpp``, silenced.

    Raises:
        InputError: llama-cpp-python is not installed.
    """
    try:
        import llama_cpp
    except ImportError as error:
        raise InputError(f"llama.cpp is not available ({error}); {_INSTALL}") from error
    llama_cpp.llama_log_set(_log_callback(llama_cpp), ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    return llama_cpp


def _said() -> str:
    """The first error that llama.cpp has logged, for the end of a message."""
    return f": {_errors[0]}" if _errors else ""


def _log_callback(llama_cpp: Any) -> Any:
    global _log
    if _log is None:

        def keep(level: int, text: bytes | None, _: Any) -> None:
            if level == _ERROR_LEVEL and text:
                _errors.append(" ".join(text.decode(errors="replace").split()))

        _log = llama_cpp.llama_log_callback(keep)
    return _log


_errors: list[str] = []

# ctypes frees a callback that Python no longer refers to, and llama.cpp would go on calling it.
_log: Any = None
