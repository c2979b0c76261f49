"""llama.cpp as an engine, through the low-level API of llama-cpp-python (extra ``llama-cpp``)."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from driftscope.errors import InputError
from driftscope.forward.batch import TokenBatch

_INSTALL = "install it with: pip install 'driftscope[llama-cpp]'"


@dataclass(frozen=True)
class LlamaCppOptions:
    """How llama.cpp runs.

    Attributes:
        kv_type: type of the key-value cache, ``f16`` (llama.cpp's default) or ``f32``.
        flash_attention: fused attention, which needs no score matrix but rounds differently.
        repack: let the CPU backend reorder quantized weights for its faster kernels.
        threads: for prompt processing and generation alike.
    """

    kv_type: str = "f16"
    flash_attention: bool = False
    repack: bool = True
    threads: int = 1

    def __post_init__(self) -> None:
        if self.kv_type not in ("f16", "f32"):
            raise InputError(f"llama.cpp: kv_type {self.kv_type!r} is unknown; expected f16 or f32")


Observer = Callable[[str, NDArray[np.float32]], None]
"""Called with the name of a tensor of llama.cpp's graph (``ffn_out-3``) and a view of it, valid during the
call. One name comes several times where llama.cpp names a tensor and then its views alike."""


def logits(
    path: Path,
    batch: TokenBatch,
    options: LlamaCppOptions = LlamaCppOptions(),
    *,
    observer: Observer | None = None,
) -> NDArray[np.float32]:
    """Logits of every token.

    Each sequence is decoded on its own, in one batch, from an empty cache.

    Args:
        path: a GGUF file.
        batch: token ids.
        options: how llama.cpp runs.
        observer: receives every contiguous float32 tensor of the graph as ``float32[rows, columns]``.

    Returns:
        ``float32[n_tokens, vocabulary]``.

    Raises:
        InputError: llama-cpp-python is not installed, or llama.cpp refuses the file or the batch.
    """
    api = _api()
    with _Session(api, path, batch.longest, options, observer) as session:
        out = np.empty((batch.n_tokens, session.vocab_size), dtype=np.float32)
        for tokens in batch.slices:
            session.decode(batch.ids[tokens], out[tokens])
    return out


def version() -> dict[str, str]:
    """Version of llama-cpp-python and llama.cpp's own description of how it was built."""
    api = _api()
    return {"llama-cpp-python": api.__version__, "system": api.llama_print_system_info().decode().strip()}


class _Session:
    """A model and a context, freed on exit."""

    def __init__(
        self, api: Any, path: Path, n_tokens: int, options: LlamaCppOptions, observer: Observer | None
    ) -> None:
        self._callback = None if observer is None else _eval_callback(api, observer)
        self._api = api
        self._path = path
        self._n_tokens = n_tokens
        self._options = options

    def __enter__(self) -> _Session:
        api, options = self._api, self._options
        model_params = api.llama_model_default_params()
        model_params.n_gpu_layers = 0
        model_params.use_extra_bufts = options.repack
        self._model = api.llama_model_load_from_file(os.fsencode(self._path), model_params)
        if not self._model:
            raise InputError(f"{self._path}: llama.cpp cannot load the file")
        self.vocab_size = int(api.llama_vocab_n_tokens(api.llama_model_get_vocab(self._model)))
        params = api.llama_context_default_params()
        params.n_ctx = self._n_tokens
        params.n_batch = params.n_ubatch = self._n_tokens
        params.n_threads = params.n_threads_batch = options.threads
        params.flash_attn_type = (
            api.LLAMA_FLASH_ATTN_TYPE_ENABLED
            if options.flash_attention
            else api.LLAMA_FLASH_ATTN_TYPE_DISABLED
        )
        params.type_k = params.type_v = api.GGML_TYPE_F32 if options.kv_type == "f32" else api.GGML_TYPE_F16
        params.offload_kqv = False
        params.no_perf = True
        if self._callback is not None:
            params.cb_eval = self._callback
        self._context = api.llama_init_from_model(self._model, params)
        if not self._context:
            api.llama_model_free(self._model)
            raise InputError(f"{self._path}: llama.cpp cannot make a context of {self._n_tokens} tokens")
        return self

    def __exit__(self, *_: object) -> None:
        self._api.llama_free(self._context)
        self._api.llama_model_free(self._model)

    def decode(self, ids: NDArray[np.int32], out: NDArray[np.float32]) -> None:
        """Write the logits of one sequence into `out`, ``float32[len(ids), vocabulary]``."""
        api = self._api
        api.llama_memory_clear(api.llama_get_memory(self._context), True)
        batch = api.llama_batch_init(len(ids), 0, 1)
        try:
            batch.n_tokens = len(ids)
            for index, token in enumerate(ids):
                batch.token[index] = int(token)
                batch.pos[index] = index
                batch.n_seq_id[index] = 1
                batch.seq_id[index][0] = 0
                batch.logits[index] = True
            status = api.llama_decode(self._context, batch)
            if status:
                raise InputError(f"{self._path}: llama.cpp cannot decode {len(ids)} tokens (status {status})")
            values = api.llama_get_logits(self._context)
            source = ctypes.cast(values, ctypes.POINTER(ctypes.c_float))
            out[:] = np.ctypeslib.as_array(source, shape=out.shape)
        finally:
            api.llama_batch_free(batch)


def _eval_callback(api: Any, observer: Observer) -> Any:
    """Wrap an observer as llama.cpp's evaluation callback, which is asked first and then shown the tensor."""
    from llama_cpp._ggml import libggml_base_path

    ggml = ctypes.CDLL(str(next(libggml_base_path.glob("*ggml-base.*"))))
    ggml.ggml_get_name.restype = ctypes.c_char_p
    ggml.ggml_get_data.restype = ctypes.c_void_p
    ggml.ggml_nelements.restype = ctypes.c_int64
    ggml.ggml_is_contiguous.restype = ctypes.c_bool

    def observed(tensor: int, ask: bool, _: int) -> bool:
        pointer = ctypes.c_void_p(tensor)
        # ggml_tensor begins with its type; ne[0] follows the buffer pointer.
        kind = ctypes.c_int32.from_address(tensor).value
        if kind != api.GGML_TYPE_F32 or not ggml.ggml_is_contiguous(pointer):
            return not ask
        if not ask:
            columns = ctypes.c_int64.from_address(tensor + 16).value
            data = ctypes.cast(ggml.ggml_get_data(pointer), ctypes.POINTER(ctypes.c_float))
            shape = (ggml.ggml_nelements(pointer) // max(1, columns), columns)
            observer(ggml.ggml_get_name(pointer).decode(), np.ctypeslib.as_array(data, shape=shape))
        return True

    return api.ggml_backend_sched_eval_callback(observed)


def _api() -> Any:
    try:
        import llama_cpp
    except ImportError as error:
        raise InputError(f"llama.cpp is not available ({error}); {_INSTALL}") from error
    llama_cpp.llama_log_set(_silent_callback(llama_cpp), ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    return llama_cpp


def _silent_callback(llama_cpp: Any) -> Any:
    global _silent
    if _silent is None:
        _silent = llama_cpp.llama_log_callback(lambda level, text, data: None)
    return _silent


# ctypes frees a callback that Python no longer refers to, and llama.cpp would go on calling it.
_silent: Any = None
