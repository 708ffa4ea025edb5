"""An exception told apart: whose it is says a frame's module, never its path; and what it tells of a checkpoint."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pydantic
import pytest
import torch

from glmpp.dryrun.pretend import failures
from glmpp.dryrun.pretend.failures import FAULT, KIT, NO_ANSWER, PACKAGE, RANKS, REFUSAL, describe, kind_of, without_paths
from glmpp.errors import GlmppError, on_behalf

CONFIG, MODEL, LAYER = "vllm.config.model", "vllm.model_executor.models.deepseek_v2", "vllm.model_executor.layers.linear"
INSTALLED = "lib/python3.11/site-packages"


def caught(*calls: tuple[str, str, str]) -> BaseException:
    """The exception of code that lies in files of given modules, each calling `inner()`, the next one.

    Args: calls: module, path and source of each, outermost first; a source may raise or say `inner()`.
    """
    inner = None
    for module, path, source in reversed(calls):
        file = Path(path)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(source)
        code = compile(source, path, "exec")

        def step(code=code, module=module, inner=inner):
            exec(code, {"__name__": module, "inner": inner, "torch": torch, "failures": failures, "on_behalf": on_behalf})

        inner = step
    with pytest.raises(Exception) as found:
        inner()
    # Without the frames of this file, as they are where vLLM calls.
    error, kept = found.value, []
    trace = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename != __file__:
            kept.append(trace)
        trace = trace.tb_next
    for one, following in zip(kept, [*kept[1:], None]):
        one.tb_next = following
    return error.with_traceback(kept[0])


@pytest.fixture
def installed(monkeypatch, tmp_path):
    """A package that says that it lies in a folder; returns the path of one of its files."""

    def install(package: str, folder: str, file: str) -> str:
        module = ModuleType(package)
        module.__path__ = [str(tmp_path / folder)]
        monkeypatch.setitem(sys.modules, package, module)
        return str(tmp_path / folder / file)

    return install


# --- where it lies ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("above", ["", "vllm", "glmpp", "torch", "vllm/über uns/glmpp", INSTALLED, "lib/python3.11"])
def test_a_place_is_the_same_wherever_packages_and_models_lie(above, installed, tmp_path):
    of_vllm = installed("vllm", f"{above}/vllm", "model_executor/models/deepseek_v2.py")
    of_torch = installed("torch", f"{above}/torch", "nn/modules/module.py")
    plugin = str(tmp_path / above / "plugins" / "faulty.py")
    error = caught(
        (MODEL, of_vllm, "inner()"),
        ("faulty", plugin, "\ninner()"),
        ("torch.nn.modules.module", of_torch, "raise KeyError('a.b')"),
    )
    told = describe(error)
    assert (told.exception, told.key, told.place) == ("KeyError", "a.b", "faulty.py:2")
    assert [line.split(" in ")[0] for line in told.traceback] == [
        "vllm/model_executor/models/deepseek_v2.py:1",
        "faulty.py:2",
    ]


@pytest.mark.parametrize("above", ["", "vllm", "vllm/models", "opt/vllm/vllm", INSTALLED])
def test_torch_is_never_taken_for_vllm(above, installed):
    """What torch raises on purpose is no refusal of vLLM's."""
    of_torch = installed("torch", f"{above}/torch", "functional.py")
    error = caught((CONFIG, of_torch + ".vllm.py", "inner()"), ("torch.functional", of_torch, "raise ValueError('no')"))
    assert kind_of(error) == FAULT


def test_a_message_loses_the_folders_of_packages_and_no_others(installed, tmp_path):
    installed("vllm", "vllm/vllm", "")
    there = tmp_path / "vllm" / "vllm" / "config.py"
    assert without_paths(f"no {there}") == "no vllm/config.py"
    for other in ("/mnt/vllm/models/X", "/mnt/glmpp/torch/X", f"{tmp_path}/vllm/models/vllm/X"):
        assert without_paths(f"no {other} there") == f"no {other} there"
    assert without_paths(f"in {torch.__path__[0]}/nn/init.py") == "in torch/nn/init.py"


# --- refusals -----------------------------------------------------------------------------------------------------


RAISES = "raise {}('sizes do not fit')"
MULTI_LINE = """
raise ValueError(
    'sizes '
    'do not fit',
)
"""
ASSERTS = """
assert (
    1 +
    1
    == 3
), 'sizes do not fit'
"""
ASSERTS_A_GPU = """
assert (
    getattr(torch,
    'cuda_is_here', False)
), 'no'
"""
FROM_IMPORT = """
try:
    import no_such_package
except ImportError as error:
    raise ValueError('please install it') from error
"""
WHILE_IMPORTING = """
try:
    import no_such_package
except ImportError:
    raise ValueError('please install it')
"""


ASKS_WHERE = """
def load(tensor):
    if tensor.device.type != 'cuda':
        for _ in range(2):
            raise ValueError('it is not on the GPU')
load(torch.empty(2))
"""
PLATFORM = """
class Platform:
    is_cuda = bool
if not Platform.is_cuda():
    raise ValueError('it has no such backend')
"""
IN_A_FALLBACK = """
try:
    import no_such_package
except ImportError:
    {}['layers.0']
"""


@pytest.mark.parametrize(
    ("module", "source", "kind"),
    [
        *(
            (module, RAISES.format(name), REFUSAL)
            for module in (CONFIG, MODEL, LAYER)
            for name in ("ValueError", "RuntimeError")
        ),
        (LAYER, RAISES.format("NotImplementedError"), REFUSAL),
        (CONFIG, MULTI_LINE, REFUSAL),
        (LAYER, ASSERTS, REFUSAL),
        (LAYER, ASSERTS_A_GPU, NO_ANSWER),
        (MODEL, "assert torch.empty(2).is_cuda", NO_ANSWER),
        ("faulty", ASKS_WHERE, NO_ANSWER),
        ("faulty", "if torch.empty(2).device.type == 'cpu': raise KeyError('elsewhere')", NO_ANSWER),
        (CONFIG, "if 'device' in 'device capability': raise ValueError('not supported')", REFUSAL),
        (LAYER, PLATFORM, REFUSAL),
        ("faulty", "raise MemoryError", NO_ANSWER),
        ("faulty", "torch.nn.Module()(1)", FAULT),
        ("faulty", IN_A_FALLBACK, FAULT),
        ("faulty", "def again(): on_behalf(again)\nagain()", FAULT),
        (LAYER, RAISES.format("KeyError"), FAULT),
        (MODEL, "{}['layers.0']", FAULT),
        (MODEL, RAISES.format("AttributeError"), FAULT),
        (MODEL, RAISES.format("TypeError"), FAULT),
        (CONFIG, "int('x')", FAULT),  # nobody raised it
        (CONFIG, "raise_ = 1; int('x')", FAULT),
        ("vllm.utils.func_utils", RAISES.format("ValueError"), FAULT),
        ("vllm_other.config", RAISES.format("ValueError"), FAULT),
        ("faulty", RAISES.format("ValueError"), FAULT),
        (CONFIG, FROM_IMPORT, PACKAGE),
        (CONFIG, WHILE_IMPORTING, PACKAGE),
        (CONFIG, "import no_such_package", PACKAGE),
        (MODEL, "torch.empty(2, device='meta').item()", FAULT),  # torch said it; with data it is asked again
        (MODEL, "torch.empty(2, device='meta').nonzero()", NO_ANSWER),
        (MODEL, "torch.ops.aten.no_such_operator", NO_ANSWER),
        (MODEL, RAISES.format("failures.NotHere"), NO_ANSWER),
        (MODEL, RAISES.format("failures.NeedsRanks"), RANKS),
    ],
)
def test_what_an_exception_tells(module, source, kind, tmp_path):
    assert kind_of(caught((module, str(tmp_path / "vllm" / "code.py"), source))) == kind


def test_of_what_pydantic_wraps_the_sentence_is_told():
    class Config(pydantic.BaseModel):
        heads: int
        layers: int = 1

        @pydantic.model_validator(mode="after")
        def check(self):
            raise ValueError("Total number of attention heads (2) must be divisible by tensor parallel size (3).")

    with pytest.raises(pydantic.ValidationError) as wrapped:
        Config(heads=2)
    said = "Total number of attention heads (2) must be divisible by tensor parallel size (3)."
    assert describe(wrapped.value).message == said
    with pytest.raises(pydantic.ValidationError) as own:
        Config(heads="many", layers=[])
    fields = failures.words_of(own.value).split("; ")
    assert [one.partition(": ")[0] for one in fields] == ["heads", "layers"] and "pydantic.dev" not in str(fields)


def test_what_pydantic_wraps_is_vllms_refusal_unless_a_package_is_missing(tmp_path):
    source = f"""
import pydantic
wrapped = {FROM_IMPORT!r}
class Config(pydantic.BaseModel):
    size: int
    @pydantic.field_validator('size')
    @classmethod
    def check(cls, size):
        {{}}
Config(size=1)
"""
    for module, raises, kind in (
        (CONFIG, "raise ValueError('not that size')", REFUSAL),
        ("faulty", "raise ValueError('not that size')", FAULT),
        (CONFIG, "exec(wrapped)", PACKAGE),
    ):
        error = caught((module, str(tmp_path / "code.py"), source.format(raises)))
        assert isinstance(error, pydantic.ValidationError) and kind_of(error) == kind


# --- whose it is --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("calls", "kind"),
    [
        ([(MODEL, "inner()"), ("glmpp.dryrun.child.tensor_outcomes", "None.columns")], KIT),
        (
            [(MODEL, "inner()"), ("glmpp.dryrun.child.tensor_outcomes", "inner()"), ("torch._ops", "raise TypeError('no')")],
            KIT,
        ),
        ([(MODEL, "inner()"), ("glmpp.dryrun.child.tensor_outcomes", "import no_such_package")], KIT),
        ([("glmpp.dryrun.child.run_stage", "inner()"), (MODEL, "{}['layers.0']")], FAULT),
        ([(MODEL, "inner()"), ("glmpp.loader", "{}['layers.0']")], FAULT),  # the helper that is looked at
        ([(MODEL, "inner()"), ("glmpp_plugin", "{}['layers.0']")], FAULT),
        ([(MODEL, "inner()"), ("glmpp.serving.write_tracking", "on_behalf(int, 'x')")], FAULT),
        ([("glmpp.dryrun.child.run_stage", "inner()"), ("glmpp.serving.write_tracking", "on_behalf(int, 'x')")], KIT),
    ],
)
def test_what_rises_in_the_kits_own_code_is_the_kits_fault(calls, kind, tmp_path):
    traced = [(module, str(tmp_path / f"{at}.py"), source) for at, (module, source) in enumerate(calls)]
    assert kind_of(caught(*traced)) == kind


def test_what_the_kit_says_on_purpose_is_no_fault_of_it(tmp_path):
    error = caught(
        ("glmpp.formats.shard", str(tmp_path / "shard.py"), "from glmpp.errors import GlmppError\nraise GlmppError('cut')")
    )
    assert isinstance(error, GlmppError) and kind_of(error) == FAULT


def test_a_failure_while_building_names_the_innermost_module_that_has_a_name():
    class Inner:
        def __init__(self, heads, prefix=""):
            raise ValueError(f"{heads} is not divisible by 8")

    class Outer:
        def __init__(self, prefix, inner):
            self.inner = Inner(4, prefix=inner and f"{prefix}.{inner}")

    for inner, named in (("attn", "vision.attn"), ("", "vision")):
        with pytest.raises(ValueError) as raised:
            Outer("vision", inner)
        assert failures.describe(raised.value).message == f"4 is not divisible by 8 (while {named} was built)"
    prefix = "no module's"
    with pytest.raises(ValueError) as raised:
        int(prefix)
    assert failures.being_built(raised.value) is None


def test_what_a_message_lists_is_left_out(tmp_path):
    """vLLM lists the parameters of the stage: in no order, and others on each."""
    names = {f"model.layers.{n}.weight" for n in range(20)}
    error = caught(
        (MODEL, str(tmp_path / "model.py"), f"raise ValueError('no x. The parameters are: ' + repr({names!r}) + ', {{1}}')")
    )
    assert describe(error).message == "no x. The parameters are: {…}, {1}"
