"""Hostile and broken input by every way in, many times: a line and an exit code that is no verdict, and nothing else.

    python tools/fuzz.py --runs 20000 --seed 0

Each input is of one kind of `KINDS`: a mutated folder of a checkpoint, files that are none (FIFOs, links, holes), names with
any characters, the config of a model without files, options, variables of the environment, the load format's own options,
and now and then all of `glmpp check` with a mutated config, through vLLM. Ends non-zero at an exception that is no
GlmppError, a fault of the kit, an exit code that is a verdict where there is none, ten seconds for an input, or 2 GB.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save

from glmpp import cli
from glmpp.checkpoint import Checkpoint
from glmpp.dryrun.installed import vllm_version
from glmpp.errors import GlmppError
from glmpp.formats.glm5 import reduced_config
from glmpp.formats.index import INDEX_FILE
from glmpp.layouts.split import balance
from glmpp.partition import PARTITION_VARIABLE, make_stages, stage_bytes
from glmpp.progress import progress_bar

SECONDS, BYTES = 10, 2_000_000_000
GLM = Path(__file__).resolve().parent.parent / "data" / "glm-5.1-fp8" / "config.json"
HUGE = [2**31, 2**53, 2**63 - 1, 2**63, 2**64, 10**30]
VALUES = [0, 1, -1, 7, *HUGE, 0.5, -0.0, 1e308, True, None, "", "F32", "F4", "../x", "/x", "\0", "\x1b[31m"]
VALUES += [[], [0], [[]], [1, 2, 3], [2**63], [0, 2**63], [-1], [1.5], [[0] * 50] * 5, {}, {"a": 1}, "é" * 50]
VALUES += ["model.safetensors", "model-00001-of-00002.safetensors"]

Files = dict[str, bytes]


def valid() -> Files:
    """A folder of two shards, an index and the config of a model of two layers."""
    tensors = {f"model.layers.{n}.{part}.weight": torch.zeros(3, 4) for n in range(2) for part in ("a", "b")}
    tensors |= {"model.embed_tokens.weight": torch.zeros(5, 2), "lm_head.weight": torch.zeros(5, 2, dtype=torch.bfloat16)}
    names = sorted(tensors)
    files, weight_map = {}, {}
    for number, held in enumerate((names[:3], names[3:]), start=1):
        file = f"model-{number:05d}-of-00002.safetensors"
        files[file] = save({name: tensors[name] for name in held}, {"format": "pt"})
        weight_map |= dict.fromkeys(held, file)
    files[INDEX_FILE] = json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}).encode()
    files["config.json"] = json.dumps({"model_type": "x", "num_hidden_layers": 2, "tie_word_embeddings": False}).encode()
    return files


def mutate(files: Files, rng: random.Random) -> Files:
    files = dict(files)
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        name = rng.choice(sorted(files))
        action = rng.choice([flip, cut, add, swap, in_json, in_json, in_json, rename])
        files = action(files, name, rng)
        if not files:
            break
    return files


def flip(files: Files, name: str, rng: random.Random) -> Files:
    data = bytearray(files[name])
    for _ in range(rng.choice([1, 1, 2, 8])):
        if data:
            at = rng.randrange(min(len(data), rng.choice([8, 64, len(data)])))
            data[at] = rng.choice([0, 255, data[at] ^ 1 << rng.randrange(8), rng.randrange(256)])
    return files | {name: bytes(data)}


def cut(files: Files, name: str, rng: random.Random) -> Files:
    return files | {name: files[name][: rng.randrange(len(files[name]) + 1)]}


def add(files: Files, name: str, rng: random.Random) -> Files:
    at = rng.randrange(len(files[name]) + 1)
    more = rng.choice([b"\0", b"{", b"]", b'"', rng.randbytes(rng.randrange(100)), files[name]])
    return files | {name: files[name][:at] + more + files[name][at:]}


def swap(files: Files, name: str, rng: random.Random) -> Files:
    other = rng.choice(sorted(files))
    return files | {name: files[other], other: files[name]}


def rename(files: Files, name: str, rng: random.Random) -> Files:
    new = rng.choice([f"{name}.part", "model.safetensors", "model-00003-of-00002.safetensors", "x" * 200])
    return {new if file == name else file: data for file, data in files.items()}


def in_json(files: Files, name: str, rng: random.Random) -> Files:
    """Change one value, key or entry somewhere in a JSON document: the file itself, or the header of a shard."""
    data = files[name]
    length = int.from_bytes(data[:8], "little") if name.endswith(".safetensors") else None
    try:
        document = json.loads(data if length is None else data[8 : 8 + length])
    except (ValueError, RecursionError):
        return files
    text = json.dumps(change(document, rng))
    if rng.random() < 0.1:
        text = rng.choice([text[:-1] + "," + text[1:], "[" * 100_000, text.replace(":", ":[", 1), text * 2])
    raw = text.encode("utf-8", "surrogatepass")
    if length is None:
        return files | {name: raw}
    told = len(raw) if rng.random() < 0.9 else rng.choice([0, len(raw) + 1, *HUGE])
    return files | {name: (told % 2**64).to_bytes(8, "little") + raw + data[8 + length :]}


def change(value, rng: random.Random):
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(sorted(value))
        kind = rng.randrange(6)
        if kind == 0:
            return {k: v for k, v in value.items() if k != key}
        if kind == 1:
            new = rng.choice([f"{key}x", "", "\x1b]0;x\x07", "__metadata__", "\ud800", *sorted(value)])
            return {(new if k == key else k): v for k, v in value.items()}
        return value | {key: change(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.7:
        at = rng.randrange(len(value))
        return [*value[:at], change(value[at], rng), *value[at + 1 :]]
    return rng.choice(VALUES)


# --- the ways in --------------------------------------------------------------------------------------------------


def write(files: Files, folder: Path) -> Path:
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


def read(folder: Path) -> None:
    """What the kit does with a folder: headers, every tensor, and the split over two stages."""
    checkpoint = Checkpoint.from_directory(folder)
    for _, tensor in checkpoint.read():
        tensor.view(torch.uint8).sum()
    stages = make_stages(checkpoint.config, 2)
    stage_bytes(checkpoint, stages)
    balance(checkpoint, 2)


def folder(rng: random.Random, place: Path) -> str:
    """Bytes flipped, cut, added and swapped; headers, index and config taken apart and put together with other values."""
    try:
        read(write(mutate(valid(), rng), place))
    except GlmppError as error:
        assert str(place) in str(error) or "layer" in str(error), f"names no file: {error}"
        return "refused"
    return "works"


def no_files(rng: random.Random, place: Path) -> str:
    """In the place of a file a FIFO, a link that leads out, to itself or to a device, a folder, a hole of 60 GB, none."""
    write(valid(), place)
    for path in rng.sample(sorted(place.iterdir()), rng.choice([1, 1, 2])):
        path.unlink()
        how = rng.randrange(9)
        if how == 0:
            os.mkfifo(path)
        elif how == 1:
            path.mkdir()
        elif how == 2:
            with path.open("wb") as file:
                file.truncate(60 * 10**9)
        elif how == 3:
            path.write_bytes(b"")
        elif how < 8:
            path.symlink_to(["/dev/zero", "/dev/tty", path.name, "x" * 255][how - 4])
    return plan([str(place), "--pp", "2"])


def names(rng: random.Random, place: Path) -> str:
    """Tensors, files and a model whose names have any characters in them: the report has as many lines as without."""
    strange = "".join(
        rng.choice(["\n", "\r", "\t", "\x1b[2J", "\u2028", "\u202e", "\ud800", "é", " ", "x" * 300, "$", "'"])
        for _ in range(9)
    )
    renamed, files = {}, valid()
    for name, data in files.items():
        text = data if name.endswith(".safetensors") else data.replace(b"lm_head.weight", json.dumps(strange)[1:-1].encode())
        if name.endswith(".safetensors") and b"lm_head.weight" in data:
            length = int.from_bytes(data[:8], "little")
            header = data[8 : 8 + length].replace(b"lm_head.weight", json.dumps(strange)[1:-1].encode())
            text = len(header).to_bytes(8, "little") + header + data[8 + length :]
        renamed[name] = text
    code, out, err = run_command(["plan", str(write(renamed, place)), "--pp", "2"])
    assert code in (0, 2), code
    said = out if code == 0 else err
    assert said.count("\n") == (9 if code == 0 else 1) and said.replace("\n", "").isprintable(), said
    return "works" if code == 0 else "refused"


def bare_config(rng: random.Random, place: Path) -> str:
    """The config from which GLM-5's tensors are told, with other values."""
    config = reduced_config(GLM)
    for _ in range(rng.choice([1, 1, 2, 3])):
        config = change(config, rng)
    path = place / "config.json"
    path.write_bytes(json.dumps(config).encode("utf-8", "surrogatepass"))
    return plan([str(path), "--pp", rng.choice(["1", "2", "8"])])


def plan(arguments: list[str]) -> str:
    code, out, err = run_command(["plan", *arguments])
    assert code in (0, 2), f"{code}: {out}{err}"
    assert code == 2 or "nan" not in out, out
    return "works" if code == 0 else "refused"


def run_command(arguments: list[str]) -> tuple[int, str, str]:
    """Exit code, output and errors of `glmpp`, in this process."""
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        code = cli.main(arguments)
    out, err = out.getvalue(), err.getvalue()
    assert code in (0, 1, 2) and "Traceback" not in out + err, f"{arguments}: {code}\n{out}{err}"
    return code, out, err


NUMBERS = [
    "1",
    "2",
    "4",
    "0",
    "1",
    "2",
    "-1",
    "-0",
    "+2",
    "1.5",
    "1e3",
    "nan",
    "inf",
    "-inf",
    "",
    " ",
    "x",
    "2_0",
    "٣",
    "0x10",
    "1" * 5000,
]
NUMBERS += [str(number) for number in HUGE]
COUNTS = [*NUMBERS, "1,1", "2,0", "0,2", "1,", ",", "1,-1,2", "1,1,1", "1;1", "1.0,1", " 1 , 1 ", "1,1\n", "\x1b,1", "é"]
GPUS = [
    "h100",
    "cpu",
    "sm90",
    "a100:40",
    "a100:0",
    "a100:-1",
    "a100:nan",
    "a100:1e30",
    "sm0",
    "sm",
    ":",
    "h100:",
    "x",
    "",
    "sm75:1MiB:x",
]


def options(rng: random.Random, place: Path) -> str:
    """Numbers, names and lists that are none. What asks vLLM is asked without it: what is wrong is told before."""
    write(valid(), place)
    command = rng.choice(["plan", "plan", "check", "layouts", "make-checkpoint"])
    own = {
        "plan": {"--pp": NUMBERS, "--tp": NUMBERS, "--layer-partition": COUNTS, "--gpu-gb": NUMBERS},
        "check": {
            "--pp": NUMBERS,
            "--tp": NUMBERS,
            "--dp": NUMBERS,
            "--context": NUMBERS,
            "--gpu": GPUS,
            "--timeout": NUMBERS,
        }
        | {
            "--gpu-memory-utilization": NUMBERS,
            "--fixes": ["known", "", ",", "x", "known,known"],
            "--ranks": ["all", "0", ""],
        },
        "layouts": {"--gpus": NUMBERS, "--gpu": GPUS, "--context": NUMBERS, "--gpu-memory-utilization": NUMBERS},
        "make-checkpoint": {"--seed": NUMBERS, "--shard-mb": ["nan", "-1", "0", "inf", "x", "1e30"]},
    }[command]
    said = [f"{name}={rng.choice(own[name])}" for name in rng.sample(sorted(own), rng.randrange(1, 3))]
    if command == "make-checkpoint":
        said = [str(GLM), *rng.choice([[], [str(place)], [str(place / "x" / "y")], [str(place / "config.json")]]), *said]
    else:
        said = [rng.choice([str(place), str(place / "config.json"), str(place / "x"), "", ".", "~", "a/b/c", "\0"]), *said]
    with variables({"GLMPP_WITHOUT_VLLM": "1"}):
        code, out, _ = run_command([command, *said])
    assert code in (0, 2) and (code == 2 or command in ("plan", "make-checkpoint")), f"{command} {said}: {code}"
    assert "nan" not in out, out
    return "works" if code == 0 else "refused"


def environment(rng: random.Random, place: Path) -> str:
    """The variables that the kit reads."""
    write(valid(), place)
    others = {"COLUMNS": rng.choice(NUMBERS[:-4]), "TMPDIR": rng.choice(["", "/dev/null", str(place)])}
    values = {PARTITION_VARIABLE: rng.choice(COUNTS), **others}
    with variables({name: value for name, value in values.items() if "\0" not in value}):
        return plan([str(place), "--pp", "2"])


@contextlib.contextmanager
def variables(values: dict[str, str]):
    before = dict(os.environ)
    os.environ.update(values)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


PATTERNS = [["*.bias"], [], "*.bias", "*", [""], [1], None, {}, {"*": 1}, True, 5, ["*", None], [["*"]], 1.5]
NAMED = [[], "known", ["known"], None, 5, [1], "", "x", ["x"], {}, True, [["known"]], ["known", "known"]]


def load_format(rng: random.Random, place: Path) -> str:
    """The load format's own options. What is accepted has a meaning, and may switch the check off only by name."""
    from vllm.config.load import LoadConfig

    from glmpp.serving.load_format import StageModelLoader

    own = {
        "num_threads": VALUES,
        "enable_multithread_load": [True, *VALUES],
        "may_stay_at_init": PATTERNS,
        "fixes": NAMED,
        "reader": ["safetensors", *VALUES],
        "incomplete": ["warn", *VALUES],
    }
    extra = {name: rng.choice(own[name]) for name in rng.sample(sorted(own), rng.randrange(1, 4))}
    extra = rng.choice([extra] * 9 + [[extra], "x", 5, True, [], None])
    try:
        config = LoadConfig(load_format="auto")
        config.model_loader_extra_config = extra
        loader = StageModelLoader(config)
    except GlmppError:
        return "refused"
    extra = extra or {}
    assert extra.get("may_stay_at_init", []) == list(loader.may_stay_at_init) and "" not in loader.may_stay_at_init
    assert type(extra.get("num_threads", 1)) is int and type(extra.get("enable_multithread_load", True)) is bool
    assert extra.get("incomplete", "refuse") == loader.incomplete in ("refuse", "warn")
    return "works"


LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "intermediate_size": 64, "head_dim": 32,
    "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 64, "rms_norm_eps": 1e-5,
    "max_position_embeddings": 128, "hidden_act": "silu", "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


MORE = ("text_config", "dtype", "quantization_config", "auto_map", "num_experts")


def llama() -> dict[str, torch.Tensor]:
    """A checkpoint that vLLM loads."""
    shapes = {"model.embed_tokens": (64, 64), "lm_head": (64, 64), "model.norm": (64,)}
    for at in ("model.layers.0", "model.layers.1"):
        shapes |= {f"{at}.{norm}_layernorm": (64,) for norm in ("input", "post_attention")}
        shapes |= {f"{at}.self_attn.{part}_proj": (64, 64) for part in "qkvo"}
        shapes |= {f"{at}.mlp.{part}_proj": (64, 64) for part in ("gate", "up", "down")}
    return {f"{name}.weight": torch.ones(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}


def check(rng: random.Random, place: Path) -> str:
    """`glmpp check` through vLLM: another value in the config, or tensors that are lost, doubled, or of another shape.

    What it says is a verdict where its exit code is one; and a lost tensor or another shape never "loads".
    """
    tensors, config, broken = llama(), dict(LLAMA), False
    how = rng.randrange(3)
    if how == 0:
        name = rng.choice(sorted(tensors))
        tensors[name], broken = torch.ones(rng.choice([(63, 64), (65,), (1,), (64, 32)]), dtype=torch.bfloat16), True
    elif how == 1:
        del tensors[rng.choice(sorted(tensors))]
        broken = True
    else:
        for _ in range(rng.choice([1, 1, 2])):
            config = change(config, rng) if rng.random() < 0.9 else {**config, rng.choice(MORE): rng.choice(VALUES)}
            if not isinstance(config, dict):
                break
    (place / "model.safetensors").write_bytes(save(tensors, {"format": "pt"}))
    (place / "config.json").write_bytes(json.dumps(config).encode("utf-8", "surrogatepass"))
    arguments = ["check", str(place), f"--pp={rng.choice([1, 2])}", "--gpu", "cpu", "--json", "--timeout", str(SECONDS * 6)]
    code, out, _ = run_command([*arguments, "--guard", rng.choice(["installed", "loader"])])
    if code == 2 and not out:
        return "refused"
    told = json.loads(out)
    verdicts = {stage["verdict"] for stage in [*told["stages"], *filter(None, [told["control"]])]}
    assert told["stages"] and code == {"loads": 0, "cannot tell": 2}.get(told["verdict"], 1), told["verdict"]
    assert code != 0 or (verdicts == {"loads"} and not broken), f"{verdicts} of {how}"
    assert broken <= (code == 1) or "cannot tell" in verdicts, f"{verdicts} of {how}"
    return told["verdict"]


# How often each is tried, of 1,000.
KINDS: dict[str, tuple[int, Callable[[random.Random, Path], str]]] = {
    "folder": (400, folder),
    "no files": (100, no_files),
    "names": (100, names),
    "config": (150, bare_config),
    "options": (120, options),
    "environment": (60, environment),
    "load format": (40, load_format),
    "check": (30, check),
}
WITH_VLLM = ("load format", "check")


class Hangs(BaseException):
    """An input that takes too long."""


def hangs(*_) -> None:
    raise Hangs(f"more than {SECONDS} s")


def run(runs: int, seed: int, progress: bool | None = None, kinds: list[str] | None = None) -> Counter:
    """(Kind, outcome) -> how often.

    Args:
        kinds: of `KINDS`; default all, without vLLM those that need none.

    Raises:
        AssertionError: an input that did something else than work or be refused; it says how to make it again.
    """
    kinds = kinds or [kind for kind in KINDS if kind not in WITH_VLLM or vllm_version()]
    often, outcomes, before = [KINDS[kind][0] for kind in kinds], Counter(), most_held()
    handler = signal.signal(signal.SIGALRM, hangs)
    with tempfile.TemporaryDirectory() as home:
        for number in progress_bar(range(runs), "fuzzing", show=progress):
            rng = random.Random(f"{seed} {number}")
            kind = rng.choices(kinds, often)[0]
            place = Path(home, str(number))
            place.mkdir()
            signal.alarm(SECONDS * (10 if kind in WITH_VLLM else 1))  # vLLM is imported once, and forks share two cores
            try:
                outcomes[kind, KINDS[kind][1](rng, place)] += 1
            except (Exception, Hangs) as error:
                what = f"--seed {seed}, input {number}, {kind}: {type(error).__name__}\n{traceback.format_exc()}"
                raise AssertionError(what) from error
            finally:
                signal.alarm(0)
            held = most_held() - before
            assert held < BYTES, f"--seed {seed}, input {number}, {kind}: {held / 1e6:.0f} MB"
            with contextlib.suppress(OSError):
                shutil.rmtree(place)
    signal.signal(signal.SIGALRM, handler)
    return outcomes


def most_held() -> int:
    """Bytes that this process has held at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", choices=KINDS)
    options = parser.parse_args()
    started, before = time.perf_counter(), most_held()
    outcomes = run(options.runs, options.seed, kinds=options.kinds)
    for kind in dict.fromkeys(kind for kind, _ in outcomes):
        counts = Counter({outcome: count for (of, outcome), count in outcomes.items() if of == kind})
        said = ", ".join(f"{count:,} {outcome}" for outcome, count in counts.most_common())
        print(f"| {kind} | {counts.total():,} | {said} |")
    held = (most_held() - before) / 1e6
    print(f"{options.runs:,} inputs in {time.perf_counter() - started:.0f} s; {held:.0f} MB more than before")
    return 0


if __name__ == "__main__":
    sys.exit(main())
