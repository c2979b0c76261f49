"""Hugging Face transformers as an engine, on the CPU in float32 (extra ``transformers``)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from driftscope.errors import InputError
from driftscope.forward.batch import TokenBatch

_INSTALL = "install it with: pip install 'driftscope[transformers]'"


def logits(folder: Path, batch: TokenBatch, *, threads: int = 1) -> NDArray[np.float32]:
    """Logits of every token, eager attention.

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


def load(folder: Path, *, threads: int = 1) -> Any:
    """The model as a torch module in float32, in evaluation mode.

    Raises:
        InputError: as in `logits`.
    """
    torch, transformers = _modules()
    torch.set_num_threads(threads)
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=torch.float32,
            attn_implementation="eager",
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise InputError(f"{folder}: transformers cannot load the model: {error}") from error
    return model.eval()


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
