"""What a benchmark was run on: ratios differ from one processor to another, so the name of it goes into the file."""

from __future__ import annotations

import platform
import re
from pathlib import Path


def processor() -> str:
    """The processor as the system names it, e.g. "Intel(R) Xeon(R) Processor"; the architecture where it does not."""
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), flags=re.M)
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine()
