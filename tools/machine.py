"""What a benchmark was run on, and its file: ratios differ from one processor to another, so its name is in there."""

from __future__ import annotations

import platform
import re
from importlib.metadata import version
from pathlib import Path

import torch

from glmpp import records
from glmpp.lab.notebook import DATA


def processor() -> str:
    """The processor as the system names it, e.g. "Intel(R) Xeon(R) Processor"; the architecture where it does not."""
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), flags=re.M)
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine()


def write(name: str, rows: list[dict], packages: tuple[str, ...], device: str = "CPU only", **how) -> Path:
    """Write a benchmark's rows to data/measurements, with versions of packages and how it was run."""
    machine = {
        "device": device,
        "system": records.SYSTEM,
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{package: version(package) for package in packages},
        "date": records.today().removeprefix("on "),
        **how,
    }
    path = DATA / "measurements" / f"{name}.json"
    records.write(path, {"machine": machine}, "rows", rows)
    return path
