"""Every published way of quantising, on three GPUs: it loads, or vLLM refuses it in these words.

Names and what is expected of them lie in `quantised/`, a file for each tool.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import os
from pathlib import Path

import pytest
import torch
from quantised import ELSEWHERE, FORMATS, NEW, OLD, REFUSALS, Model, Refusal, cases, quantised
from safetensors.torch import save_file

from glmpp.checkpoint import Checkpoint, TensorSpec
from glmpp.dryrun.deployment import Deployment
from glmpp.dryrun.dry_run import dry_run
from glmpp.dryrun.installed import vllm_version
from glmpp.dryrun.stage_report import LOADS
from glmpp.ledger import LOADED, digest

pytest.importorskip("vllm")
VLLM = vllm_version()
pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(VLLM not in OLD + NEW, reason="the table is about other releases"),
]
GPUS = ("a100", "h100", "b200")
AROUND = {"platform", "driver", "class inspection", "pipeline group"}  # what stands in outside the model


def refusal(form: str, model: str, gpu: str) -> Refusal | None:
    """The first that covers a case: a GPU is refused before a scheme is looked for, a scheme before experts are."""
    return next((one for one in REFUSALS if one.covers(form, model, gpu)), None)


def depends_on_gpu(form: str, model: str) -> bool:
    return len({refusal(form, model, gpu) for gpu in GPUS}) > 1


def wanted() -> list[tuple[str, str, str]]:
    """All cases in `make test-matrix`; elsewhere those on an H100, and those that another GPU changes."""
    everything = os.environ.get("GLMPP_EVERY_CASE") == "1"
    return [
        (form, model, gpu)
        for gpu in GPUS
        for form, model in cases()
        if everything or gpu == "h100" or depends_on_gpu(form, model)
    ]


@pytest.mark.parametrize(("form", "model", "gpu"), wanted(), ids=lambda value: value)
def test_a_quantised_checkpoint_loads_or_is_refused_in_vllms_words(form, model, gpu):
    library = {"torchao": "torchao", "bitsandbytes": "bitsandbytes"}.get(form.split(",")[0])
    if library and importlib.util.find_spec(library):
        pytest.skip(f"{library} is installed: the table is about environments without it")
    checkpoint = quantised(form, model)
    report = dry_run(checkpoint, Deployment(1, gpu=gpu), progress=False)
    (stage,) = report.stages
    said = f"{stage.exception}: {stage.message}"
    if expected := refusal(form, model, gpu):
        assert (stage.verdict, expected.words in said) == (expected.verdict, True), said
        assert stage.place.startswith("vllm/"), stage.place
        return
    assert stage.verdict == LOADS, (said, stage.place, stage.unaccounted)
    assert report.stand_ins.keys() <= AROUND
    assert stage.model_class.startswith("vllm.")
    # GPTQ's g_idx says nothing without desc_act: 0.33.0 has no place for it.
    lost = [name for name, column in stage.ledger.tensors.items() if column != LOADED]
    assert not [name for name in lost if not (VLLM in NEW and name.endswith(".g_idx"))]


def methods() -> set[str]:
    """QUANTIZATION_METHODS of the installed vLLM, read from its source."""
    package = Path(importlib.util.find_spec("vllm").origin).parent
    tree = ast.parse((package / "model_executor" / "layers" / "quantization" / "__init__.py").read_text())
    (listed,) = (
        node.value.slice
        for node in tree.body
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "QuantizationMethods"
    )
    return set(ast.literal_eval(listed))


def test_every_method_of_the_installed_vllm_is_covered_or_accounted_for():
    assert methods() <= {form.method for form in FORMATS.values()} | ELSEWHERE.keys()
    assert not ELSEWHERE.keys() & {form.method for form in FORMATS.values()}


@pytest.mark.parametrize("form", [name for name, form in FORMATS.items() if form.method == "compressed-tensors"])
def test_names_are_those_that_compressed_tensors_writes(form):
    """One linear layer, compressed by the library that vLLM brings."""
    from compressed_tensors.compressors.base import compress_module
    from compressed_tensors.quantization import QuantizationConfig, QuantizationStatus, apply_quantization_config

    out, size = 256, 512
    config = {**FORMATS[form].config(Model({})), "kv_cache_scheme": None, "ignore": []}
    layer = torch.nn.Linear(size, out, bias=False, dtype=torch.bfloat16)
    scheme = QuantizationConfig.model_validate(config)
    scheme.quantization_status = QuantizationStatus.FROZEN
    apply_quantization_config(torch.nn.ModuleDict({"q_proj": layer}), scheme)
    layer.quantization_scheme.format = config["format"]
    with torch.compiler.set_stance("force_eager"):
        compress_module(layer)
    written = FORMATS[form].linear(out, size).items()
    expected = {suffix: TensorSpec(suffix, dtype, shape).in_torch for suffix, (dtype, shape) in written}
    assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in layer.state_dict().items()} == expected


def write_bytes(checkpoint: Checkpoint, folder: Path) -> Checkpoint:
    """The checkpoint as a folder: one shard, its bytes random, below 120 so that no FP8 or BF16 among them is NaN."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for spec in checkpoint.values():
        content = torch.randint(0, 120, (spec.nbytes,), dtype=torch.uint8, generator=generator)
        tensors[spec.name] = content.view(spec.torch_dtype).reshape(spec.shape)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(checkpoint.config))
    return Checkpoint.from_directory(folder)


@pytest.mark.parametrize(
    ("form", "model"),
    [
        ("fp8, blocks", "moe"),
        ("modelopt, NVFP4", "dense"),
        ("compressed-tensors, W4A16", "moe"),
        ("mxfp4", "gpt_oss"),
    ],
)
def test_bytes_of_two_stages_are_those_of_one_and_of_the_file(form, model, tmp_path):
    checkpoint = write_bytes(quantised(form, model), tmp_path)
    report = dry_run(checkpoint, Deployment(2, gpu="h100"), weights="real", progress=False)
    assert [stage.verdict for stage in report.all] == [LOADS] * 3

    def digests(*stages) -> dict[str, str]:  # what is left at init is memory as it was found
        return {name: d for stage in stages for name, d in stage.digests.items() if name not in stage.accounted}

    assert digests(*report.stages) == digests(report.control)
    # What vLLM neither fuses nor changes, whatever it calls it.
    alone = (".o_proj.weight", "norm.weight", "embed_tokens.weight")
    stored = set(digests(report.control).values())
    assert all(digest(tensor) in stored for name, tensor in checkpoint.read() if name.endswith(alone))
