"""Which Python package an import fails for, and what the installed vLLM asks of it."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, packages_distributions, requires, version

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from glmpp.engine.contract import vllm_version


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
