"""Which files of a model vLLM opens, by the rules of its default loader for `--load-format auto`, and what is told of that.

Source: `DefaultModelLoader._prepare_weights` of vLLM 0.22.1 and 0.33.0. Of an index it uses the names of files alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

from glmpp.errors import GlmppError, short
from glmpp.formats.index import INDEX_FILE, natural_key
from glmpp.words import quoted, shown, some

SAFETENSORS = "*.safetensors"
MISTRALS, MISTRALS_INDEX = "consolidated*.safetensors", "consolidated.safetensors.index.json"
PICKLES = ("*.bin", "*.pt")
OF_TRAINING = ("training_args.bin", "optimizer.bin", "optimizer.pt", "scheduler.pt", "scaler.pt")
ADAPTER = "adapter_config.json"


@dataclass(frozen=True)
class WeightFiles:
    """What vLLM opens of a folder or a repository, by the names that are there.

    Attributes:
        pattern: the first one that matches; "" if none does.
        files: of the folder itself that match it, in the order in which they are read; the index then leaves some out.
        index: name of the index that is looked at, if it is there.
        others: files of the folder that other patterns would take.
    """

    pattern: str
    files: list[str]
    index: str | None
    others: list[str]

    def opened(self, listed: Collection[str]) -> list[str]:
        """The files that are left, given those that the index names; {} without an index."""
        return [file for file in self.files if not listed or file in listed]

    def missing(self, listed: Collection[str]) -> list[str]:
        """What the index names and vLLM does not find."""
        return sorted(set(listed) - set(self.files), key=natural_key)


def weight_files(names: Iterable[str]) -> WeightFiles:
    """Args: names: of all files, with their folders; one in a subfolder is never opened, and may decide the format."""
    names = set(names)
    own = sorted((name for name in names if "/" not in name and not name.startswith(".")), key=natural_key)

    def matching(pattern: str) -> list[str]:
        return [name for name in own if fnmatchcase(name, pattern)]

    every = [name for pattern in (SAFETENSORS, *PICKLES) for name in matching(pattern) if name not in OF_TRAINING]
    if any(fnmatchcase(name.rpartition("/")[2], MISTRALS) for name in names):
        pattern, index = MISTRALS, MISTRALS_INDEX
    else:
        pattern = next((one for one in (SAFETENSORS, *PICKLES) if matching(one)), "")
        index = INDEX_FILE if pattern in ("", SAFETENSORS) else None
    files = [name for name in matching(pattern) if not name.endswith(OF_TRAINING)]
    return WeightFiles(pattern, files, index if index in own else None, [name for name in every if name not in files])


def check_readable(found: WeightFiles, label: str, names: Collection[str]) -> None:
    """Raise a GlmppError for what vLLM opens and the kit does not read, and where it opens nothing."""
    if found.pattern in PICKLES and found.files:
        raise GlmppError(f"{label}: vLLM would open {some(found.files)} ({found.pattern}); glmpp reads safetensors only")
    if found.files or found.index:
        return
    beside = ""
    if found.pattern == MISTRALS:
        beside = f"; one in a subfolder is called {MISTRALS}, and then it opens nothing else"
    elif gguf := sorted(name for name in names if name.endswith(".gguf")):
        beside = f"; {some(gguf)} it opens when the file itself is named, and glmpp reads safetensors only"
    patterns = MISTRALS if found.pattern == MISTRALS else ", ".join((SAFETENSORS, *PICKLES))
    raise GlmppError(f"{label}: vLLM finds no weights here (it opens {patterns} of the folder itself){beside}")


def by_file(weight_map: Mapping[str, str] | None) -> dict[str, set[str]]:
    """The tensors that an index places in each file."""
    listed: dict[str, set[str]] = {}
    for name, file in (weight_map or {}).items():
        listed.setdefault(file, set()).add(name)
    return listed


def missing_line(place: object, names: Collection[str], lies: bool = False) -> str:
    """What is said of a shard that an index names and vLLM does not find."""
    why = "lies where vLLM does not look for shards" if lies else "the shard is missing"
    return f"{place}: {why}; the index places {len(names)} tensors in it, e.g. {quoted(min(names))}"


def notes(found: WeightFiles, listed: Mapping[str, Collection[str]], held: Mapping[str, Collection[str]]) -> list[str]:
    """What is told of the choice of files, a line each; [] where there was none.

    Args:
        listed: file -> tensors, by the index; {} without one.
        held: file -> tensors, by the headers of the files that are opened.
    """
    lines, opened = [], found.opened(listed)
    if not found.index and len(opened) > 1:
        lines.append(f"without an index vLLM opens every {found.pattern} of the folder: {some(opened)}")
    if left := [file for file in found.files if file not in opened]:
        lines.append(f"not opened by vLLM, as {found.index} does not name them: {some(left)}")
    if others := [file for file in found.others if file not in left]:
        lines.append(f"not opened by vLLM, as it prefers {found.pattern}: {some(others)}")
    for file in opened if listed else ():
        if file not in held:
            continue
        if absent := sorted(set(listed[file]) - set(held[file])):
            lines.append(f"{found.index} places {quoted(absent[0])} in {file} ({len(absent)} such), which does not hold it")
        if extra := sorted(set(held[file]) - set(listed[file])):
            lines.append(f"{file} holds {quoted(extra[0])} ({len(extra)} such), which {found.index} does not place there")
    times = Counter(name for names in held.values() for name in names)
    if twins := [name for name, number in times.items() if number > 1]:
        where = some([file for file, names in held.items() if twins[0] in names])
        lines.append(f"{quoted(twins[0])} ({len(twins)} such) lies in {where}: vLLM keeps the last that it reads")
    return [shown(line, 500) for line in lines]


def adapter_line(label: str, config: Mapping) -> str:
    """What is said of a folder or repository that holds an adapter and no model, by its adapter_config.json."""
    base = short(config.get("base_model_name_or_path"))
    return (
        f"{label}: is an adapter ({ADAPTER}, peft_type {short(config.get('peft_type'))}) and no model of its own; check its "
        f"base model, {base}, which vLLM serves with --enable-lora --lora-modules NAME=ADAPTER"
    )


def check_serves_alone(config: Mapping, label: str) -> None:
    """Raise a GlmppError for a drafter in the speculators format: vLLM builds the model that it drafts for."""
    kind = config.get("speculators_model_type")
    if kind is None:
        return
    about = config.get("speculators_config")
    verifier = about.get("verifier") if isinstance(about, dict) else None
    name = verifier.get("name_or_path") if isinstance(verifier, dict) else None
    raise GlmppError(
        f"{label}: is a drafter in the speculators format ({short(kind)}) and no model of its own; it needs the model "
        f"that it drafts for, {short(name)}: given the drafter, vLLM serves that model with it. Check that model"
    )
