"""The CUDA sources compiled for the host, and a card that runs them there."""

from __future__ import annotations

import contextlib
import struct
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from driftscope.kernels.cuda.sources import FOLDER, Kernel

HERE = Path(__file__).resolve().parent
# The scheduler of the threads is not under test, and slow with the sanitizers.
PLAIN_FLAGS = ("-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror")
# No contraction, so that a product is rounded before it is added, as -fmad=false has it on the device.
FLAGS = (
    *("-std=c++17", "-O1", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"),
    *("-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
)


def build(folder: Path, kernels: Sequence[Kernel]) -> Path:
    """Compile instances of kernels, and the program that runs them."""

    def compile_one(text: str, name: str) -> Path:
        (folder / f"{name}.cpp").write_text(text)
        done = subprocess.run(
            [
                "g++",
                *(PLAIN_FLAGS if name == "main" else FLAGS),
                "-I",
                HERE,
                "-I",
                FOLDER,
                "-c",
                f"{name}.cpp",
                "-o",
                f"{name}.o",
            ],
            cwd=folder,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return folder / f"{name}.o"

    texts = {"main": (HERE / "host.cpp").read_text()}
    for file in sorted({kernel.file for kernel in kernels}):
        names = [kernel.name for kernel in kernels if kernel.file == file]
        for part in range(0, len(names), 60):
            added = "".join(f'    add("{name}", &{name});\n' for name in names[part : part + 60])
            texts[f"{Path(file).stem}_{part}"] = (
                f'#include "cuda_on_host.h"\nnamespace {{\n#include "{file}"\n'
                f"const bool added = [] {{\n{added}    return true;\n}}();\n}}\n"
            )
    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, texts.values(), texts))
    program = folder / "host"
    subprocess.run(["g++", *FLAGS, *objects, "-o", program], check=True)
    return program


class HostArray(np.ndarray):  # type: ignore[type-arg]
    """An array that counts as one of the device."""


class HostCard:
    """Runs every launch twice, threads and blocks in rising and in falling order: the bytes must agree."""

    name = "host"
    memory = 1 << 20

    def __init__(self, program: Path) -> None:
        self._program = program
        self._process: subprocess.Popen[bytes] | None = None

    def owns(self, array: Any) -> bool:
        return isinstance(array, HostArray)

    def upload(self, array: NDArray[Any]) -> Any:
        return np.array(array, order="C").view(HostArray)

    def download(self, array: Any) -> NDArray[Any]:
        return np.array(array, subok=False)

    def contiguous(self, array: Any, dtype: Any) -> Any:
        return np.ascontiguousarray(array, dtype).view(HostArray)

    def empty(self, shape: tuple[int, ...], dtype: Any) -> Any:
        # Neither zero nor a number that a kernel would give.
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        return np.full(size, 0xA5, np.uint8).view(dtype).reshape(shape).view(HostArray)

    def full(self, shape: tuple[int, ...], value: Any, dtype: Any) -> Any:
        return np.full(shape, value, dtype).view(HostArray)

    def launch(self, kernel: Kernel, grid: tuple[int, int], threads: int, *arguments: Any) -> None:
        rising, falling = (self._run(kernel, grid, threads, arguments, order) for order in (0, 1))
        arrays = [item for item in arguments if isinstance(item, np.ndarray)]
        scratch = kernel.name.startswith("attention<")
        for i, (array, up, down) in enumerate(zip(arrays, rising, falling, strict=True)):
            # What is left in the room for weights depends on the order; nothing reads it.
            if not (scratch and i == len(arrays) - 2):
                assert up == down, f"{kernel.name}: array {i} depends on the order of the threads"
            array.view(np.ndarray)[...] = np.frombuffer(up, array.dtype).reshape(array.shape)

    def _run(
        self, kernel: Kernel, grid: tuple[int, int], threads: int, arguments: Sequence[Any], order: int
    ) -> list[bytes]:
        if self._process is None:
            self._process = subprocess.Popen(
                [self._program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
            )
        stdin, stdout, stderr = self._process.stdin, self._process.stdout, self._process.stderr
        assert stdin
        assert stdout
        assert stderr
        name = kernel.name.encode()
        message = [struct.pack("<I", len(name)), name]
        message.append(struct.pack("<5I", *grid, threads, order, len(arguments)))
        sizes = []
        for item in arguments:
            data = item.tobytes()
            message += [struct.pack("<Q", len(data)), data]
            if isinstance(item, np.ndarray):
                assert item.flags.c_contiguous
                sizes.append(len(data))
        # Where the program has ended, standard error says why.
        with contextlib.suppress(BrokenPipeError):
            stdin.write(b"".join(message))
            stdin.flush()
        found = [stdout.read(size) for size in sizes]
        if any(len(data) != size for data, size in zip(found, sizes, strict=True)):
            said = stderr.read().decode()
            self.close()
            raise AssertionError(f"{kernel.name}: {said}")
        return found

    def close(self) -> None:
        """End the program; the next launch starts it anew."""
        if self._process is not None:
            self._process.communicate()
            self._process = None
