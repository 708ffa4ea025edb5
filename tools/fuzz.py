"""Mutate a valid checkpoint folder, many times, and read it: nothing but a GlmppError may come of it.

    python tools/fuzz.py --runs 20000 --seed 0

Bytes are flipped, cut, added and swapped; headers, the index and the config are taken apart and put together with other
values. For each input: the exception, the seconds, and what the process holds. Ends non-zero at another exception, over two
seconds for an input, or when memory grows by 500 MB.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

import torch
from safetensors.torch import save

from glmpp.checkpoint import Checkpoint
from glmpp.errors import GlmppError
from glmpp.formats.index import INDEX_FILE
from glmpp.partition import balance, make_stages, stage_bytes
from glmpp.progress import progress_bar

SECONDS, BYTES = 2.0, 500_000_000
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


def read(folder: Path) -> None:
    """What the kit does with a folder: headers, every tensor, and the split over two stages."""
    checkpoint = Checkpoint.from_directory(folder)
    for _, tensor in checkpoint.read():
        tensor.view(torch.uint8).sum()
    stages = make_stages(checkpoint.config, 2)
    stage_bytes(checkpoint, stages)
    balance(checkpoint, 2)


def run(runs: int, seed: int, progress: bool | None = None) -> Counter:
    """Outcomes, by kind.

    Raises:
        AssertionError: an input that did something else than work or end in a GlmppError; it says how to make it again.
    """
    good, outcomes, before = valid(), Counter(), most_held()
    with tempfile.TemporaryDirectory() as folder:
        for number in progress_bar(range(runs), "fuzzing", show=progress):
            files = mutate(good, random.Random(f"{seed} {number}"))
            place = Path(folder, str(number))
            place.mkdir()
            for name, data in files.items():
                (place / name).write_bytes(data)
            started, outcome = time.perf_counter(), "reads"
            try:
                read(place)
            except GlmppError as error:
                outcome = "refused"
                assert str(place) in str(error) or "layer" in str(error), f"{seed} {number}: names no file: {error}"
            except Exception as error:
                raise AssertionError(
                    f"seed {seed}, input {number}: {type(error).__name__}\n{traceback.format_exc()}"
                ) from error
            seconds = time.perf_counter() - started
            held = most_held() - before
            assert seconds < SECONDS, f"seed {seed}, input {number}: {seconds:.1f} s"
            assert held < BYTES, f"seed {seed}, input {number}: {held / 1e6:.0f} MB"
            outcomes[outcome] += 1
            for name in files:
                (place / name).unlink()
            place.rmdir()
    return outcomes


def most_held() -> int:
    """Bytes that this process has held at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    started, before = time.perf_counter(), most_held()
    outcomes = run(options.runs, options.seed)
    held = most_held() - before
    counts = ", ".join(f"{count:,} {outcome}" for outcome, count in outcomes.most_common())
    print(
        f"{options.runs:,} inputs in {time.perf_counter() - started:.0f} s: {counts}; {held / 1e6:.0f} MB more than before"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
