"""Which package an import needs: missing, not what vLLM asks for, or too new for it."""

from __future__ import annotations

import re

import pytest

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm

from glmpp.dryrun.pretend import failures  # noqa: E402
from glmpp.dryrun.pretend.failures import what_to_install  # noqa: E402


@pytest.mark.parametrize(
    ("module", "asked", "said"),
    [
        ("no_such_package.part", [], "the package no_such_package is not installed here"),
        (
            "transformers.models.x",
            ["transformers>=1"],
            "newer than vLLM .* knows: install an older transformers .vLLM asks for >=1.",
        ),
        (
            "transformers",
            ["transformers>=99"],
            "change transformers: .* asks for transformers>=99, and .* is installed",
        ),
        ("transformers", ["transformers; extra == 'all'"], "^transformers [0-9.]+ has no such name$"),
        ("yaml", ["PyYAML"], "^PyYAML [0-9.]+ has no such name$"),
        ("numpy", ["numpy==INSTALLED"], "^numpy [0-9.]+ has no such name$"),
        ("vllm.config", [], "vLLM .* has no such name: what asks for it is made for another release"),
    ],
)
def test_what_is_said_of_an_import_that_fails(module, asked, said, monkeypatch):
    asked = [line.replace("INSTALLED", failures.version("numpy")) for line in asked]
    monkeypatch.setattr(failures, "requires", lambda name: asked)
    assert re.search(said, what_to_install(ImportError("no", name=module)))


def test_of_a_name_that_several_packages_share_none_is_blamed(monkeypatch):
    monkeypatch.setattr(failures, "packages_distributions", lambda: {"google": ["a", "b"], "vllm": ["vllm"]})
    assert "that brings google.protobuf" in what_to_install(ImportError("no", name="google.protobuf"))
