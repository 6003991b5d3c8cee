"""The API reference and the docstrings of the KVM API say what is so: their examples run."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
from pathlib import Path

import pytest

import lasskvm.kvm
from lasskvm.kvm import System, Vcpu, Vm
from lasskvm.kvm.interface import SystemInterface, VcpuInterface, VmInterface

PAGE = Path(__file__).parents[2] / "docs" / "api.md"
MODULES = [
    module.name for module in pkgutil.walk_packages(lasskvm.kvm.__path__, "lasskvm.kvm.") if not module.ispkg
]


def test_examples_of_the_api_reference_print_what_it_says() -> None:
    result = doctest.testfile(str(PAGE), module_relative=False)
    assert result.attempted > 40
    assert not result.failed


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings_print_what_they_say(name: str) -> None:
    assert not doctest.testmod(importlib.import_module(name)).failed


@pytest.mark.parametrize(
    ("interface", "provider"), [(SystemInterface, System), (VmInterface, Vm), (VcpuInterface, Vcpu)]
)
def test_the_soft_provider_has_everything_of_the_interface_and_the_reference_names_it(
    interface: type, provider: type
) -> None:
    names = {name for name in vars(interface) if not name.startswith("_")}
    text = PAGE.read_text()
    for name in names:
        assert hasattr(provider, name) or name == "immediate_exit", name
        named = name in text or name.replace("set_", "get_") in text
        assert named, f"docs/api.md does not tell of {name}"
