"""Install llama-cpp-python from a cached wheel, building it from source the first time.

The build takes minutes; the wheel is kept in the user's cache, under the version and the processor's
features, because llama.cpp is compiled for the machine that builds it.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def pinned_version() -> str:
    """Return the version that constraints.txt pins."""
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        name, _, version = line.strip().partition("==")
        if name == "llama-cpp-python" or name == "llama_cpp_python":
            return version
    sys.exit("constraints.txt does not pin llama-cpp-python")


def processor() -> str:
    """Return a short digest of the processor's features."""
    text = platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        lines = cpuinfo.read_text(encoding="utf-8").splitlines()
        text += next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def main() -> None:
    """Install the pinned version unless it is there."""
    version = pinned_version()
    try:
        if importlib.metadata.version("llama-cpp-python") == version:
            return
    except importlib.metadata.PackageNotFoundError:
        pass
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    tag = f"{version}-{sysconfig.get_python_version()}-{processor()}"
    folder = cache / "driftscope" / "wheels" / tag
    pip = [sys.executable, "-m", "pip"]
    if not sorted(folder.glob("*.whl")):
        print(f"building llama-cpp-python {version} from source; this takes some minutes once", flush=True)
        environment = {"CMAKE_BUILD_PARALLEL_LEVEL": str(os.cpu_count() or 1), **os.environ}
        command = [*pip, "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder)]
        subprocess.run([*command, f"llama-cpp-python=={version}"], check=True, env=environment)
    wheel = sorted(folder.glob("*.whl"))[-1]
    constraints = ["--constraint", str(ROOT / "constraints.txt")]
    subprocess.run([*pip, "install", "--quiet", *constraints, str(wheel)], check=True)


if __name__ == "__main__":
    main()
