"""Run each finding's reproduction, as its ISSUE.md gives it, on vLLM as it is and with the fix; a fork each.

    python reproduce.py UPSTREAM NAME…

Prints a line of JSON: name -> [how it ended, how it ended with the fix], "" for well.
"""

import importlib.util
import json
import os
import re
import sys
from pathlib import Path

import vllm.config
import vllm.model_executor.models.utils  # noqa: F401


def code(folder: Path) -> str:
    (block,) = re.findall(r"```python\n(.*?)```", (folder / "ISSUE.md").read_text(), re.DOTALL)
    return block


def end_of(folder: Path, fixed: bool) -> str:
    """ "KeyError: …" or "" of a run in a fork."""
    read, write = os.pipe()
    if os.fork() == 0:
        said = ""
        try:
            if fixed:
                spec = importlib.util.spec_from_file_location("fix", folder / "fix.py")
                fix = importlib.util.module_from_spec(spec)
                spec.loader.exec_module(fix)
                fix.apply()
            exec(compile(code(folder), "ISSUE.md", "exec"), {"__name__": "__main__"})
        except BaseException as error:
            said = f"{type(error).__name__}: {error}"
        os.write(write, said.encode()[:4000])
        os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        said = pipe.read().decode(errors="replace")
    os.wait()
    return said


if __name__ == "__main__":
    upstream, *names = sys.argv[1:]
    ends = {name: [end_of(Path(upstream, name), fixed) for fixed in (False, True)] for name in names}
    print("\n" + json.dumps(ends))
