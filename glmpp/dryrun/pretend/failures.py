"""An exception as evidence: whose it is, what it tells of a checkpoint, where it rose, without this machine's paths.

Whose code a frame is says its module's name, never its path: a folder may be called anything.
"""

from __future__ import annotations

import ast
import dis
import linecache
import re
import sys
import sysconfig
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, packages_distributions, requires, version
from pathlib import Path
from types import TracebackType

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from glmpp.dryrun.messages import Failure
from glmpp.errors import GlmppError, chain, is_pydantics, on_behalf, says_no_memory
from glmpp.serving.contract import vllm_version

# What an exception is. FAULT is the model's or the checkpoint's, and REFUSAL is vLLM's "no" on purpose: both are verdicts,
# they would be the same on the GPU itself. The others are none.
FAULT, REFUSAL, KIT, PACKAGE, RANKS, NO_ANSWER = "fault", "refusal", "glmpp", "package", "other ranks", "no answer"
NO_VERDICT = {
    PACKAGE: "no verdict on the checkpoint",
    RANKS: "no verdict: this rank waits for others, and runs alone",
    NO_ANSWER: "no verdict: torch cannot do this without data, without the GPU, or without more memory",
}

# What vLLM refuses with, and where it does. A KeyError, or an error elsewhere, may come of the pretence.
REFUSES_WITH = (ValueError, NotImplementedError, RuntimeError, AssertionError)
REFUSES_IN = (
    *("vllm.config", "vllm.engine.arg_utils", "vllm.transformers_utils", "vllm.platforms", "vllm.distributed.utils"),
    *("vllm.model_executor", "vllm.models", "vllm.v1.attention"),
)
# In an assertion: what is asserted of the hardware was pretended. In a condition: where a tensor lies was pretended.
# What a platform says of itself, `is_cuda()`, is vLLM's own answer.
OF_THE_HARDWARE = re.compile(r"cuda|device")
OF_A_PLACE = re.compile(r"\bis_(cuda|meta)\b(?!\()|\.device\b(\.type)?\s*(==|!=|in)")
# What this machine lacks: memory, a GPU.
OF_THIS_MACHINE = ("OutOfMemoryError", "AcceleratorError")

# Packages that models call: an exception in one of them is the caller's.
LIBRARIES = {
    *sys.stdlib_module_names,
    "numpy",
    "pydantic",
    "pydantic_core",
    "safetensors",
    "torch",
    "transformers",
    "triton",
}
LISTED = re.compile(r"\{[^{}:]{200,}\}")  # a set, in no order: what is listed after a name and a colon stays
RANKS_AWAY = "no other process of this group is here"  # in the name of a group, which torch repeats
STUDIED = ("glmpp.loader",)  # the helper in its wrong versions: the kit's code that stands in for a model's
SHOWN = (*STUDIED, "glmpp.serving.load_format")
PACKAGES = ("vllm", "torch", "transformers", "glmpp")


class NotHere(NotImplementedError):
    """What a stand-in says that was asked for more than it can do."""


class NeedsRanks(RuntimeError):
    """What a rank says that runs alone and was asked for others."""


@dataclass(frozen=True)
class Frame:
    """A line of a traceback: `module` is the name of the module whose code it is."""

    module: str
    path: str
    line: int
    function: str

    @property
    def package(self) -> str:
        return self.module.partition(".")[0]

    @property
    def file(self) -> str:
        """The file without the machine: from the package on, of a module that is in no package its name alone."""
        for folder in getattr(sys.modules.get(self.package), "__path__", ()):
            if Path(self.path).is_relative_to(folder):
                return f"{self.package}/{Path(self.path).relative_to(folder).as_posix()}"
        return Path(self.path).name

    @property
    def is_shown(self) -> bool:
        """Whether it is worth showing: vLLM's, a model's, the kit's where it stands in for these."""
        own = self.package == "glmpp" and self.module not in SHOWN
        return not own and self.package not in LIBRARIES and not self.path.startswith("<")

    def __str__(self) -> str:
        return f"{self.file}:{self.line} in {self.function}\n    {linecache.getline(self.path, self.line).strip()}"


def frames(error: BaseException) -> list[Frame]:
    """Of an exception's traceback, outermost first."""
    found = []
    for each in _tracebacks(error):
        code = each.tb_frame.f_code
        module = each.tb_frame.f_globals.get("__name__") or ""
        found.append(Frame(str(module), code.co_filename, each.tb_lineno, code.co_name))
    return found


def describe(error: BaseException) -> Failure:
    """Exception type, message, key, where in vLLM, the model or the kit's helper it rose, and the trimmed traceback."""
    every = frames(error)
    shown = [frame for frame in every if frame.is_shown]
    last = (shown or every)[-1]
    said, built = LISTED.sub("{…}", without_paths(words_of(error))), being_built(error)
    return Failure(
        exception=type(error).__name__,
        message=said[:2000] + (f" (while {built} was built)" if built else ""),
        key=str(error.args[0]) if isinstance(error, KeyError) and error.args else None,
        place=f"{last.file}:{last.line}",
        function=last.function,
        traceback=[str(frame) for frame in shown],
    )


def words_of(error: BaseException) -> str:
    """What an exception says; of pydantic's, the sentences of vLLM's own checks without what pydantic puts around them."""
    if not is_pydantics(error):
        return str(error)
    own = [(one.get("ctx", {}).get("error"), ".".join(map(str, one["loc"])), one["msg"]) for one in error.errors()]
    return "; ".join(str(said) if said else f"{where}: {what}" if where else what for said, where, what in own)


def being_built(error: BaseException) -> str | None:
    """The module in whose `__init__` an exception rose, by the dotted name that vLLM hands down as `prefix`."""
    inits = (each.tb_frame for each in reversed(_tracebacks(error)) if each.tb_frame.f_code.co_name == "__init__")
    names = (frame.f_locals.get("prefix") for frame in inits)
    return next((name for name in names if isinstance(name, str) and name), None)


def without_paths(text: str) -> str:
    """A message without the folders in which packages are installed on this machine."""
    folders = {f"{folder}/": f"{name}/" for name in PACKAGES for folder in getattr(sys.modules.get(name), "__path__", ())}
    folders |= {f"{sysconfig.get_path(kind)}/": "" for kind in ("purelib", "platlib", "stdlib")}
    for folder in sorted(folders, key=len, reverse=True):
        text = text.replace(folder, folders[folder])
    return text


# --- what an exception tells --------------------------------------------------------------------------------------


def kind_of(error: BaseException) -> str:
    """KIT, PACKAGE, RANKS, NO_ANSWER, REFUSAL, or FAULT for all that is none of these."""
    causes = list(chain(error, while_handling=not isinstance(error, (LookupError, AttributeError))))
    if any(isinstance(cause, NeedsRanks) for cause in causes) or RANKS_AWAY in str(error):
        return RANKS
    if is_kits(error):
        return KIT
    if any(isinstance(cause, ImportError) for cause in causes):
        return PACKAGE
    if any(map(_is_of_the_pretence, causes)):
        return NO_ANSWER
    return REFUSAL if is_refusal(error) else FAULT


def is_kits(error: BaseException) -> bool:
    """Whether it rose in the kit's own code, or in a library that the kit called. A GlmppError is what the kit says."""
    if isinstance(error, (GlmppError, NotHere, NeedsRanks, RecursionError, MemoryError)):
        return False
    every = frames(error)
    while every:
        frame = every.pop()
        if (frame.module, frame.function) == (on_behalf.__module__, on_behalf.__name__):
            every.pop()  # who called on behalf of others
        elif frame.package not in LIBRARIES:
            return frame.package == "glmpp" and frame.module not in STUDIED
    return False


def is_refusal(error: BaseException) -> bool:
    """Whether vLLM raised it on purpose, with a type and in a place that are known for it."""
    every = frames(error)
    if is_pydantics(error) or type(error).__name__.startswith("StrictDataclass"):  # a check of vLLM's or transformers' own
        return any(frame.package == "vllm" for frame in every)
    if not isinstance(error, REFUSES_WITH) or not every or not _is_in(every[-1].module, REFUSES_IN):
        return False
    return _was_raised(_tracebacks(error)[-1])


def _is_in(module: str, packages: tuple[str, ...]) -> bool:
    return any(module == package or module.startswith(f"{package}.") for package in packages)


def _is_of_the_pretence(error: BaseException) -> bool:
    """Whether it comes of what is not here: the GPU, its memory and operators. On the GPU itself it might not rise."""
    every = frames(error)
    if isinstance(error, NotHere) or type(error).__name__ in OF_THIS_MACHINE or says_no_memory(error):
        return True
    if not every:
        return False
    inner, raised = every[-1], _was_raised(_tracebacks(error)[-1])
    if _is_in(inner.module, ("torch.cuda", "triton", "torch._ops")):
        return True
    if isinstance(error, AttributeError):
        return type(getattr(error, "obj", None)).__module__.partition(".")[0] == "glmpp"  # what stands in lacks it
    if isinstance(error, NotImplementedError) and not raised:  # torch has no such kernel for this device
        return True
    if isinstance(error, NotImplementedError) and inner.package == "torch":
        return not _is_in(inner.module, ("torch.nn",))
    if not raised or inner.package in LIBRARIES:
        return False
    said, conditions = _statement(inner)
    return bool((isinstance(error, AssertionError) and OF_THE_HARDWARE.search(said)) or OF_A_PLACE.search(conditions))


def _tracebacks(error: BaseException) -> list[TracebackType]:
    found, each = [], error.__traceback__
    while each is not None:
        found.append(each)
        each = each.tb_next
    return found


def _was_raised(last: TracebackType) -> bool:
    """Whether a `raise` or an `assert` ended in this frame, and not a call of something written in C."""
    return dis.opname[last.tb_frame.f_code.co_code[last.tb_lasti]] == "RAISE_VARARGS"


def _statement(frame: Frame) -> tuple[str, str]:
    """The whole statement that a line is part of, and the conditions of the `if`s around it in its function."""
    source = "".join(linecache.getlines(frame.path))
    try:
        tree = ast.parse(source)
    except SyntaxError:
        return linecache.getline(frame.path, frame.line), ""
    around = [node for node in ast.walk(tree) if isinstance(node, ast.stmt) and node.lineno <= frame.line <= node.end_lineno]
    functions = [at for at, node in enumerate(around) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
    inside = around[functions[-1] if functions else 0 :]  # `walk` goes from the outside in
    conditions = "; ".join(ast.unparse(node.test) for node in inside if isinstance(node, ast.If))
    smallest = min(around, key=lambda node: node.end_lineno - node.lineno, default=None)
    return ast.get_source_segment(source, smallest) or "" if smallest else "", conditions


def what_to_install(error: ImportError) -> str:
    """A sentence about the package that an import needs: it is missing, not what vLLM asks for, or too new for it.

    vLLM states the oldest release of a package that will do, seldom the newest: a name that is missing in a release that
    vLLM allows has been taken away since.

    Args:
        error: with the `name` of the module that cannot be imported, or that lacks something.
    """
    module = (error.name or "").partition(".")[0]
    bringing = set(packages_distributions().get(module, ()))
    if len(bringing) > 1:  # a namespace that several share
        return f"the package that brings {error.name} is missing, or another release of it is needed"
    package = next(iter(bringing), module)
    try:
        installed = version(package)
    except PackageNotFoundError:
        return f"the package {package} is not installed here"
    if module == "vllm":
        return f"vLLM {installed} has no such name: what asks for it is made for another release of vLLM"
    asked = [Requirement(line) for line in requires(vllm_distribution()) or ()]
    wanted = next((one.specifier for one in asked if one.name.lower() == package.lower() and one.marker is None), None)
    if not wanted or wanted == SpecifierSet(f"=={installed}"):
        return f"{package} {installed} has no such name"
    if not wanted.contains(installed, prereleases=True):
        return f"change {package}: vLLM {vllm_version()} asks for {package}{wanted}, and {installed} is installed"
    return (
        f"{package} {installed} is newer than vLLM {vllm_version()} knows: install an older {package} "
        f"(vLLM asks for {wanted}), or a newer vLLM"
    )


def vllm_distribution() -> str:
    return next(iter(packages_distributions().get("vllm", ())), "vllm")
