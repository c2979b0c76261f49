"""A trace on disk: the taps of one engine for some prompts, in a folder that any engine's author can write.

``trace.json`` says what was run; the arrays lie in safetensors files beside it. `docs/reference/traces.md`
is the format's page.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from driftscope.artifacts.files import list_folder, read_json_object
from driftscope.artifacts.safetensors import StoredTensor, read_safetensors
from driftscope.artifacts.tensor import TensorRef
from driftscope.errors import InputError
from driftscope.evidence.atomic import replacing
from driftscope.forward.architecture import LAYER_TAPS, WHOLE_TAPS, tap_name
from driftscope.forward.arithmetic import Arithmetic
from driftscope.forward.batch import TokenBatch
from driftscope.forward.policy import WHOLE_MODEL

F32 = NDArray[np.float32]

MANIFEST = "trace.json"
FORMAT, VERSION = "driftscope-trace", 1

RAGGED = ("attn_scores", "attn_softmax")
"""Taps whose width depends on the length of the sequence."""

PARTS: Mapping[str, tuple[str, ...]] = {"qkv_matmul": ("q", "k", "v"), "qkv_bias": ("q", "k", "v")}
"""Taps that may be stored in parts, ``layers.3.qkv_bias.q`` and so on, which lie side by side."""

_FLOATS = ("F32", "F16", "BF16", "F64")
_NAME = re.compile(
    r"(?:layers\.(?P<layer>0|[1-9][0-9]{0,4})\.)?(?P<tap>[A-Za-z0-9_-]+)(?:\.(?P<part>[a-z]+))?"
    r"(?:\[(?P<prompt>[^\[\]]+)\])?"
)
_FILE = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*\.safetensors")
_ABOUT = ("capture_point", "absent")
_KNOWN_KEYS = {
    *("format", "version", "engine", "model", "arithmetic", "prompts", "taps", "files", "arrays_sha256")
}


@dataclass(frozen=True)
class TraceManifest:
    """What a trace says about itself.

    Attributes:
        prompts: prompt id and token ids, in the order in which the prompts' tokens lie in an array.
        engine: ``name``, and as far as known ``version`` and ``options``.
        model: as far as known ``file``, ``sha256``, ``architecture``.
        arithmetic: what it was computed in, or None where nobody knows.
        capture_points: tap (without its layer) to what exactly it holds; a tap that is not listed is taken
            to hold what `driftscope.forward.architecture` says.
        absent: tap (without its layer) to the reason why the engine does not give it.
        files: names of the safetensors files; empty for all of the folder.
        arrays_sha256: digest of the files' digests, so that the manifest changes with the arrays; empty where
            the writer did not say. It is not checked on reading.
    """

    prompts: tuple[tuple[str, tuple[int, ...]], ...]
    engine: Mapping[str, Any] = field(default_factory=lambda: {"name": "unknown"})
    model: Mapping[str, Any] = field(default_factory=dict)
    arithmetic: Arithmetic | None = None
    capture_points: Mapping[str, str] = field(default_factory=dict)
    absent: Mapping[str, str] = field(default_factory=dict)
    files: tuple[str, ...] = ()
    arrays_sha256: str = ""

    @property
    def batch(self) -> TokenBatch:
        """The tokens of all prompts."""
        return TokenBatch.of([ids for _, ids in self.prompts])

    @property
    def token_digests(self) -> dict[str, str]:
        """Prompt id to the SHA-256 of its token ids as little-endian int32."""
        return {
            prompt: hashlib.sha256(np.array(ids, dtype="<i4").tobytes()).hexdigest()
            for prompt, ids in self.prompts
        }

    def to_dict(self) -> dict[str, Any]:
        """The document of ``trace.json``."""
        taps: dict[str, dict[str, str]] = {}
        for key, values in (("capture_point", self.capture_points), ("absent", self.absent)):
            for tap, text in values.items():
                taps.setdefault(tap, {})[key] = text
        return {
            "format": FORMAT,
            "version": VERSION,
            "engine": dict(self.engine),
            "model": dict(self.model),
            "arithmetic": None if self.arithmetic is None else self.arithmetic.to_dict(),
            "prompts": [{"id": prompt, "ids": [int(i) for i in ids]} for prompt, ids in self.prompts],
            "taps": taps,
            "files": list(self.files),
            "arrays_sha256": self.arrays_sha256,
        }

    @classmethod
    def from_dict(cls, document: Mapping[str, Any], where: str) -> TraceManifest:
        """The inverse of `to_dict`; only ``format``, ``version`` and ``prompts`` must be there.

        Raises:
            InputError: not a trace, another version, or a key of the wrong kind.
        """
        if document.get("format") != FORMAT or document.get("version") != VERSION:
            raise InputError(
                f"{where}: format {document.get('format')!r}, version {document.get('version')!r}; "
                f"expected {FORMAT!r}, version {VERSION}"
            )
        if unknown := sorted(set(document) - _KNOWN_KEYS):
            raise InputError(
                f"{where}: unknown key {unknown[0]!r}; expected one of {', '.join(sorted(_KNOWN_KEYS))}"
            )
        taps = _mapping(document, "taps", where)
        for tap, about in taps.items():
            if not isinstance(about, Mapping) or not all(
                key in _ABOUT and isinstance(text, str) for key, text in about.items()
            ):
                raise InputError(
                    f"{where}: taps: {tap!r} must give {' or '.join(_ABOUT)} as text, and only that"
                )
        arithmetic = document.get("arithmetic")
        if arithmetic is not None and not isinstance(arithmetic, Mapping):
            raise InputError(f"{where}: arithmetic must be an object or null")
        files = document.get("files") or []
        if not isinstance(files, list) or not all(_is_plain(name) for name in files):
            raise InputError(f"{where}: files must name .safetensors files of the folder, without a path")
        if len(set(files)) != len(files):
            raise InputError(f"{where}: files names one file twice")
        digest = document.get("arrays_sha256") or ""
        if not isinstance(digest, str):
            raise InputError(f"{where}: arrays_sha256 must be text")
        return cls(
            prompts=_prompts(document.get("prompts"), where),
            engine=_mapping(document, "engine", where) or {"name": "unknown"},
            model=_mapping(document, "model", where),
            arithmetic=None if arithmetic is None else Arithmetic.from_dict(arithmetic),
            capture_points={
                t: about["capture_point"] for t, about in taps.items() if "capture_point" in about
            },
            absent={t: about["absent"] for t, about in taps.items() if "absent" in about},
            files=tuple(files),
            arrays_sha256=digest,
        )


class Trace:
    """A trace that lies on disk; arrays are read when they are asked for.

    Attributes:
        folder: where it lies.
        manifest: what it says about itself.
        batch: its tokens.
    """

    def __init__(self, folder: Path) -> None:
        """Open a trace.

        Raises:
            InputError: no manifest, a malformed one, an unusable safetensors file, an array whose name is not
                that of a tap or of a prompt of the manifest, or one tap twice.
        """
        if not (folder / MANIFEST).exists():
            raise InputError(f"{folder}: there is no {MANIFEST}; expected the folder of a trace")
        self.folder = folder
        self.manifest = TraceManifest.from_dict(read_json_object(folder / MANIFEST), str(folder / MANIFEST))
        self.batch = self.manifest.batch
        self._ids = tuple(prompt for prompt, _ in self.manifest.prompts)
        self._stored: dict[tuple[int, str], dict[str, dict[str, StoredTensor]]] = {}
        names = self.manifest.files or tuple(
            path.name for path in list_folder(folder) if path.suffix == ".safetensors"
        )
        for name in names:
            for tensor in read_safetensors(folder / name).values():
                self._add(tensor)

    @property
    def name(self) -> str:
        """A short name for messages: that of the engine, or of the folder."""
        return str(self.manifest.engine.get("name") or self.folder.name)

    @property
    def places(self) -> frozenset[tuple[int, str]]:
        """Layer (`WHOLE_MODEL` for none) and tap of all that is complete: every prompt, every part."""
        return frozenset(place for place in self._stored if self.has(*place))

    def has(self, layer: int, tap: str) -> bool:
        """Whether a tap is there for every prompt."""
        return self._arrays(layer, tap) is not None

    def tap(self, layer: int, tap: str) -> F32:
        """One tap of all tokens, ``float32[n_tokens, channels]``; prompts one after another.

        Raises:
            InputError: it is not there, is `RAGGED`, or its shape is not that of its prompts' tokens.
        """
        if tap in RAGGED:
            raise InputError(f"{self.folder}: {tap_name(layer, tap)} is one array a prompt; ask for `ragged`")
        rows = []
        for length, parts in self._required(layer, tap):
            for tensor in parts:
                _check_shape(
                    tensor, len(tensor.shape) == 2 and tensor.shape[0] == length, f"[{length}, channels]"
                )
            arrays = [_read(tensor) for tensor in parts]
            rows.append(arrays[0] if len(arrays) == 1 else np.concatenate(arrays, axis=1))
        self._check_same(layer, tap, [array.shape[1] for array in rows], "channels")
        return rows[0] if len(rows) == 1 else np.concatenate(rows)

    def ragged(self, layer: int, tap: str) -> list[F32]:
        """One tap of `RAGGED`: for each prompt ``float32[t, heads * t]``, head by head.

        Raises:
            InputError: it is not there, or its shape is not that of scores.
        """
        found = []
        for length, (tensor, *_) in self._required(layer, tap):
            shape = tensor.shape
            square = len(shape) == 3 and shape[1:] == (length, length)
            flat = len(shape) == 2 and shape[0] == length and shape[1] % length == 0
            _check_shape(
                tensor, square or flat, f"[heads, {length}, {length}] or [{length}, heads * {length}]"
            )
            array = _read(tensor)
            if square:
                array = np.ascontiguousarray(array.swapaxes(0, 1)).reshape(length, -1)
            found.append(array)
        self._check_same(layer, tap, [array.shape[1] // array.shape[0] for array in found], "heads")
        return found

    def _add(self, tensor: StoredTensor) -> None:
        """Enter an array by layer and tap, prompt and part; empty text for all prompts, for no part."""
        match = _NAME.fullmatch(tensor.name)
        layer = WHOLE_MODEL if match is None or match["layer"] is None else int(match["layer"])
        if match is None or not is_tap(layer, match["tap"], match["part"] or ""):
            raise InputError(
                f"{tensor.file}: the name {_short(tensor.name)} is not that of a tap; expected "
                f"{', '.join(WHOLE_TAPS)}, or layers.N. and one of {', '.join(LAYER_TAPS)}; "
                "and [prompt] after it where it holds one prompt"
            )
        place = (layer, match["tap"])
        prompt, part = match["prompt"] or "", match["part"] or ""
        if prompt and prompt not in self._ids:
            raise InputError(
                f"{tensor.file}: {_short(tensor.name)} is of a prompt that {MANIFEST} does not list"
            )
        prompts = self._stored.setdefault(place, {})
        parts = prompts.setdefault(prompt, {})
        twice = part in parts or (parts and "" in (part, *parts)) or ("" in prompts and len(prompts) > 1)
        if twice:
            raise InputError(
                f"{tensor.file}: {_short(tensor.name)} is there twice: in two files, in parts too, or by "
                "prompt too"
            )
        parts[part] = tensor

    def _required(self, layer: int, tap: str) -> list[tuple[int, tuple[StoredTensor, ...]]]:
        found = self._arrays(layer, tap)
        if found is None:
            some = " in full: a prompt or a part is missing" if (layer, tap) in self._stored else ""
            raise InputError(f"{self.folder}: the trace has no {tap_name(layer, tap)}{some}")
        return found

    def _arrays(self, layer: int, tap: str) -> list[tuple[int, tuple[StoredTensor, ...]]] | None:
        """For each array that a tap is put together from, its number of tokens and its parts.

        None if one is missing.
        """
        stored = self._stored.get((layer, tap), {})
        if "" in stored:
            if tap in RAGGED and len(self._ids) > 1:
                return None
            wanted = [("", self.batch.n_tokens)]
        else:
            wanted = [(prompt, len(ids)) for prompt, ids in self.manifest.prompts]
        found = []
        for prompt, length in wanted:
            parts = stored.get(prompt, {})
            names = ("",) if "" in parts else PARTS.get(tap, ("",))
            if not all(name in parts for name in names):
                return None
            found.append((length, tuple(parts[name] for name in names)))
        return found

    def _check_same(self, layer: int, tap: str, counts: Sequence[int], what: str) -> None:
        if len(set(counts)) > 1:
            raise InputError(
                f"{self.folder}: {tap_name(layer, tap)} has {counts[0]} {what} in one prompt and "
                f"{next(n for n in counts if n != counts[0])} in another"
            )


class TraceWriter:
    """Writes a trace, one file at a time, so that no more than one file's arrays are held.

    The manifest is written last: a folder without one is no trace.
    """

    def __init__(self, folder: Path) -> None:
        """Begin a trace in a folder, which is made where it is missing; files of an earlier trace go.

        Raises:
            InputError: the folder holds a safetensors file that no trace wrote, or cannot be written.
        """
        self.folder = folder
        self._files: list[str] = []
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for path in _earlier_files(folder):
                path.unlink()
        except OSError as error:
            raise InputError(f"{folder}: cannot be written: {error.strerror or error}") from error

    def write(self, stem: str, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Write ``<stem>.safetensors``; names as in `Trace`, values float32 or float16.

        Raises:
            InputError: it cannot be written.
            ValueError: a stem that is used already or is no plain name, or another dtype.
        """
        from safetensors.numpy import save_file

        if not arrays:
            return
        name = f"{stem}.safetensors"
        if not _is_plain(name) or name in self._files:
            raise ValueError(f"{name!r} is no plain file name, or was written already")
        for key, array in arrays.items():
            if array.dtype not in (np.float32, np.float16):
                raise ValueError(f"{key} has the dtype {array.dtype}; expected float32 or float16")
        contiguous = {key: np.ascontiguousarray(array) for key, array in arrays.items()}
        with replacing(self.folder / name) as partial:
            try:
                save_file(contiguous, partial, metadata={"format": FORMAT})
            except Exception as error:
                # safetensors reports a full disk as its own error type, without an errno.
                raise InputError(f"{self.folder / name}: cannot be written: {error}") from error
        self._files.append(name)

    def finish(self, manifest: TraceManifest) -> Trace:
        """Write the manifest and open the trace."""
        write_manifest(self.folder, manifest, self._files)
        return Trace(self.folder)


def _earlier_files(folder: Path) -> list[Path]:
    """The manifest and the arrays of an earlier trace, also of one that was not finished.

    Raises:
        InputError: the folder holds a safetensors file that no trace wrote: a model, perhaps.
    """
    manifest = folder / MANIFEST
    arrays = [path for path in list_folder(folder) if path.suffix == ".safetensors"]
    listed: set[str] = set()
    if manifest.exists():
        listed = set(TraceManifest.from_dict(read_json_object(manifest), str(manifest)).files)
    for path in arrays:
        if path.name not in listed and not _is_of_a_trace(path):
            raise InputError(f"{path}: not a trace's; expected a folder for a trace alone")
    return [*([manifest] if manifest.exists() else []), *arrays]


def _is_of_a_trace(path: Path) -> bool:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as stream:
            return (stream.metadata() or {}).get("format") == FORMAT
    except (OSError, SafetensorError):
        return False


def write_manifest(folder: Path, manifest: TraceManifest, files: Sequence[str]) -> None:
    """Write ``trace.json`` beside the safetensors files of a trace, with their digest."""
    digest = hashlib.sha256()
    for name in files:
        with (folder / name).open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    document = {**manifest.to_dict(), "files": list(files), "arrays_sha256": digest.hexdigest()}
    text = json.dumps(document, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
    with replacing(folder / MANIFEST) as partial:
        partial.write_text(text, encoding="utf-8")


def _read(tensor: StoredTensor) -> F32:
    from driftscope.kernels.dequantize import dequantize

    if tensor.dtype not in _FLOATS:
        raise InputError(
            f"{tensor.file}: {tensor.name} has the dtype {tensor.dtype}; expected one of {', '.join(_FLOATS)}"
        )
    ref = TensorRef(
        tensor.name, tensor.name, tensor.shape, tensor.dtype, tensor.file, tensor.offset, tensor.nbytes
    )
    return dequantize(np.ascontiguousarray(ref.raw()), tensor.dtype).reshape(tensor.shape)


def _check_shape(tensor: StoredTensor, fits: bool, expected: str) -> None:
    if not fits or 0 in tensor.shape:
        raise InputError(
            f"{tensor.file}: {tensor.name} has the shape {list(tensor.shape)}; expected {expected}"
        )


def _short(text: str) -> str:
    """A name for a message: printable, cut where it is long."""
    shown = text if text.isprintable() else repr(text)
    return shown if len(shown) <= 100 else f"{shown[:97]}..."


def _prompts(value: Any, where: str) -> tuple[tuple[str, tuple[int, ...]], ...]:
    if not isinstance(value, list) or not value:
        raise InputError(f"{where}: prompts must list at least one prompt with its token ids")
    found = []
    for item in value:
        ids = item.get("ids") if isinstance(item, Mapping) else None
        name = item.get("id") if isinstance(item, Mapping) else None
        if not isinstance(name, str) or not is_prompt_id(name) or not _are_ids(ids):
            raise InputError(
                f"{where}: a prompt needs an id (printable text without brackets) and ids (a list of one or "
                "more token ids, 0 to 2147483647)"
            )
        found.append((name, tuple(ids or ())))
    if len({name for name, _ in found}) != len(found):
        raise InputError(f"{where}: two prompts have the same id")
    return tuple(found)


def is_tap(layer: int, tap: str, part: str = "") -> bool:
    """Whether there is such a tap, at a layer or (`WHOLE_MODEL`) at none, and such a part of it."""
    return tap in (WHOLE_TAPS if layer == WHOLE_MODEL else LAYER_TAPS) and part in ("", *PARTS.get(tap, ()))


def is_prompt_id(name: str) -> bool:
    """Whether a prompt can be called so: names of arrays end in it, within brackets."""
    return bool(name) and name.isprintable() and not set(name) & set("[]")


def _are_ids(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(i, int) and not isinstance(i, bool) and 0 <= i < 2**31 for i in value)
    )


def _mapping(document: Mapping[str, Any], key: str, where: str) -> Mapping[str, Any]:
    value = document.get(key) or {}
    if not isinstance(value, Mapping):
        raise InputError(f"{where}: {key} must be an object")
    return value


def _is_plain(name: Any) -> bool:
    return isinstance(name, str) and _FILE.fullmatch(name) is not None
