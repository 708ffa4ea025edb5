"""Make the environment that `make` runs in, or find a Python other than the one at hand.

    python tools/environment.py make .venv lab,vllm,readers,weights,test
    python tools/environment.py other .venv         # the path of the newest Python that .venv is not made of
    python tools/environment.py other .venv 3.12    # the path of that one
    python tools/environment.py lock .venv          # renew constraints.txt; what pyproject.toml still allows stays
    python tools/environment.py lock .venv --upgrade

Needs nothing but a Python, and an old one only to be told that it is too old.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PYTHONS = [(3, 10), (3, 11), (3, 12), (3, 13)]  # those that constraints.txt is made for
VLLM_EXTRAS = ("vllm", "readers")
# As uv names them; the oldest glibc for which all wheels exist. torch has none for Intel Macs.
PLATFORMS = ["x86_64-manylinux_2_31", "aarch64-manylinux_2_34", "aarch64-apple-darwin"]


def dotted(version) -> str:
    return ".".join(map(str, version[:2]))


def check_python() -> None:
    if sys.version_info[:2] not in PYTHONS:
        raise SystemExit(
            f"glmpp's environment needs Python {dotted(PYTHONS[0])} to {dotted(PYTHONS[-1])}; {sys.executable} is "
            f"{dotted(sys.version_info)}. Name another: make ... PYTHON=python{dotted(PYTHONS[-1])}"
        )
    try:
        import ensurepip  # noqa: F401  a package of its own on Debian and Ubuntu
        import venv  # noqa: F401
    except ImportError:
        raise SystemExit(
            f"{sys.executable} cannot make environments: its venv or ensurepip is missing. On Debian and Ubuntu: "
            f"apt install python{dotted(sys.version_info)}-venv"
        ) from None


def make(folder: Path, extras: str) -> None:
    """Install the locked versions into a new environment; one that is there, finished or not, is replaced."""
    check_python()
    if folder.exists() and not (folder / "pyvenv.cfg").exists() and any(folder.iterdir()):
        raise SystemExit(f"{folder} is not an environment: left alone")
    run([sys.executable, "-m", "venv", "--clear", folder], f"{sys.executable} could not make {folder}")
    python, lock = folder / "bin" / "python", ["-c", "constraints.txt"]
    run(
        [python, "-m", "pip", "install", "--quiet", *lock, "uv"],
        "uv could not be installed: is the package index reachable?",
    )
    install = [folder / "bin" / "uv", "pip", "install", "--python", python, *lock]
    failed = "The locked versions could not be installed: see the lines above."
    if "vllm" in extras.split(","):
        rest = ",".join(extra for extra in extras.split(",") if extra not in VLLM_EXTRAS)
        failed += (
            " vLLM has wheels for Linux with glibc on x86-64 and aarch64; elsewhere the kit runs without it and shows "
            f"recorded results: make ... EXTRAS={rest}"
        )
    run([*install, "-e", f".[{extras}]"], failed)


def lock(folder: Path, *options: str) -> None:
    """One resolution for all Pythons and platforms, then for each of them that its pins exist, and as wheels."""
    compile_ = [folder / "bin" / "uv", "pip", "compile", "--quiet", "--all-extras", "--no-annotate", "--no-header"]
    nowhere = ["--no-emit-index-url", "--no-emit-find-links"]
    target = ["--universal", "--python-version", dotted(PYTHONS[0]), "--output-file", "constraints.txt"]
    run([*compile_, *nowhere, *target, *options, "pyproject.toml"], "no versions satisfy pyproject.toml everywhere")
    for version in PYTHONS:
        for platform in PLATFORMS:
            where = ["--python-version", dotted(version), "--python-platform", platform, "--no-build"]
            check = [*compile_, *where, "-c", "constraints.txt", "--output-file", os.devnull, "pyproject.toml"]
            run(check, f"constraints.txt cannot be installed on Python {dotted(version)}, {platform}")


def run(command: list, failed: str) -> None:
    print(" ".join(map(str, command)), flush=True)
    if subprocess.run(list(map(str, command)), cwd=ROOT).returncode != 0:
        raise SystemExit(failed)


def other(folder: Path, wanted: str) -> str:
    """A Python that runs here and can make environments: of the version wanted, else the newest that is not the folder's."""
    mine = version_of(str(folder / "bin" / "python")) or sys.version_info[:2]
    if wanted:
        versions = [version for version in PYTHONS if dotted(version) == wanted]
    else:
        versions = [version for version in reversed(PYTHONS) if version != mine]
    for version in versions:
        for candidate in candidates(folder, version):
            if version_of(candidate) == version:
                return candidate
    names = ", ".join(f"python{dotted(version)}" for version in versions) or f"none: {wanted!r} is not one of those locked"
    raise SystemExit(
        f"No Python other than {dotted(mine)} was found (looked for {names}: on PATH, in pyenv's versions, and with uv). "
        "Nothing was tested."
    )


def candidates(folder: Path, version):
    """Paths where that version may be; a name on PATH can be a shim that runs nothing."""
    yield shutil.which(f"python{dotted(version)}")
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")
    yield from map(str, sorted((pyenv / "versions").glob(f"{dotted(version)}.*/bin/python3")))
    uv = shutil.which("uv", path=f"{folder / 'bin'}{os.pathsep}{os.environ.get('PATH', '')}")
    if uv is not None:
        find = [uv, "python", "find", "--no-project", "--no-python-downloads", "--managed-python", dotted(version)]
        yield subprocess.run(find, capture_output=True, text=True).stdout.strip()


def version_of(python):
    """(3, 13) if that is what runs under this path, with what an environment needs, else None."""
    program = "import ensurepip, sys, venv; print(*sys.version_info[:2])"
    if not python or not Path(python).exists():
        return None
    ran = subprocess.run([python, "-c", program], capture_output=True, text=True)
    return tuple(map(int, ran.stdout.split())) if ran.returncode == 0 else None


def main() -> None:
    what, folder, *rest = sys.argv[1:]
    if what == "other":
        print(other(ROOT / folder, *rest or [""]))
    else:
        {"make": make, "lock": lock}[what](ROOT / folder, *rest)


if __name__ == "__main__":
    main()
