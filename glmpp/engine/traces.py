"""An exception as evidence: what rose, where in vLLM or the model, without the paths of this machine."""

from __future__ import annotations

import os
import re
import traceback


def trim(path: str) -> str:
    """A source path without the machine: from the package on."""
    match = re.search(r"(?:.*/(?:site|dist)-packages/|.*/lib/python[\d.]+/|.*/(?=glmpp/))(.+)", path)
    return match[1] if match else os.path.basename(path)


def is_shown(path: str) -> bool:
    """Whether a source line is worth showing: vLLM's, a model's, the kit's helpers', not what they call."""
    inner = re.search(r"/lib/python[\d.]+/(?!site-packages/|dist-packages/)", path) is not None
    return not inner and not re.match(
        r"torch/|transformers/|pydantic|glmpp/(?!loader\.py|engine/load_format\.py)|<", trim(path)
    )


def describe(error: BaseException) -> dict:
    """Exception type, message, key, where in vLLM (or in the kit's helper) it rose, and the trimmed traceback."""
    frames = traceback.extract_tb(error.__traceback__)
    shown = [f for f in frames if is_shown(f.filename) and f.name != "__torch_dispatch__"]  # the recorder's: all pass it
    lines = [(trim(f.filename), f.lineno, f.name, f.line) for f in shown]
    file, line, function, _ = lines[-1] if lines else (trim(frames[-1].filename), frames[-1].lineno, frames[-1].name, "")
    message = re.sub(r"(?<![\w.])/[\w./-]+/(?=(?:vllm|torch|glmpp|transformers)/)", "", str(error))
    return {
        "exception": type(error).__name__,
        "message": message[:2000],
        "key": str(error.args[0]) if isinstance(error, KeyError) and error.args else None,
        "place": f"{file}:{line}",
        "function": function,
        "traceback": [f"{file}:{line} in {function}\n    {source}" for file, line, function, source in lines],
    }
