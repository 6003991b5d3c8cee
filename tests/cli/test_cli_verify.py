"""``lasskvm verify``: formats, selection, exit statuses."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from cli_support import Cli

from lasskvm.conformance import backends
from lasskvm.conformance.cases import all_cases
from lasskvm.errors import HostError
from lasskvm.lass import is_lass_violation

FEW = "data and user-read and lass"


def test_a_group_on_the_emulator_passes(cli: Cli) -> None:
    result = cli("verify", "--backend", "emulator", "-k", "rings/cpl and lass")
    assert result.status == 0
    assert "rings" in result.out
    assert "emulator: 32 pass in" in result.out
    assert "runs per second" in result.out


def test_json(cli: Cli) -> None:
    result = cli("verify", "--backend", "emulator", "--format", "json", "-k", FEW)
    document = json.loads(result.out)
    assert document["backend"] == "emulator"
    assert document["summary"]["pass"] == len(document["cases"]) > 5
    assert set(document["cases"][0]) == {
        "id", "group", "variant", "status", "expected", "got", "reason", "disassembly",
    }  # fmt: skip


def test_tap_and_junit(cli: Cli) -> None:
    tap = cli("verify", "--backend", "emulator", "--format", "tap", "-k", FEW).out
    assert tap.startswith("TAP version 14\n1..")
    junit = cli("verify", "--backend", "emulator", "--format", "junit", "-k", FEW).out
    assert ElementTree.fromstring(junit).attrib["failures"] == "0"


def test_the_report_goes_to_a_file(cli: Cli, tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    result = cli("verify", "--backend", "emulator", "--format", "json", "--output", file, "-k", FEW)
    assert (result.status, result.out) == (0, "")
    assert json.loads(file.read_text())["summary"]["fail"] == 0
    assert "pass" in result.error


def test_a_table_goes_to_a_file_too(cli: Cli, tmp_path: Path) -> None:
    file = tmp_path / "report.txt"
    assert cli("verify", "--backend", "emulator", "--output", file, "-k", FEW).status == 0
    assert "data" in file.read_text()


def test_a_wrong_rule_is_exit_status_1_with_the_failures(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing_is_a_violation(*arguments: int) -> bool:
        return False

    assert is_lass_violation(1 << 63, 1, 0, cpl=3, cr4=1 << 27, efer=1 << 10, rflags=0)
    monkeypatch.setattr("lasskvm.emulator.mmu.is_lass_violation", nothing_is_a_violation)
    result = cli("verify", "--backend", "emulator", "-k", "stack/push-register")
    assert result.status == 1
    assert "FAIL stack/push-register-supervisor-low [lass]" in result.out
    assert "push rax" in result.out
    assert "expected:    #SS(0) at access" in result.out
    assert "got:         completes" in result.out


def test_stopping_at_the_first_bad_run(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lasskvm.emulator.mmu.is_lass_violation", lambda *arguments: False)
    result = cli("verify", "--backend", "emulator", "-x", "--format", "json", "-k", "stack and lass")
    assert result.status == 1
    assert json.loads(result.out)["summary"]["fail"] == 1


def test_list_names_the_runs_and_makes_none(cli: Cli) -> None:
    result = cli("verify", "--list")
    assert result.status == 0
    assert len(result.out.splitlines()) > 3 * len(all_cases())
    assert "stack/push-register-user-high [forced]: " in result.out


def test_a_selection_without_runs_is_an_error(cli: Cli) -> None:
    result = cli("verify", "-k", "no-such-case")
    assert result.status == 2
    assert "no run has a name that fits" in result.err


def test_a_bad_expression_is_an_error(cli: Cli) -> None:
    result = cli("verify", "-k", "stack and")
    assert result.status == 2
    assert "a name is missing at the end" in result.error


def test_no_kvm_is_exit_status_2_with_what_to_do(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(provider: str) -> None:
        raise HostError("this host has no /dev/kvm; load kvm_intel or kvm_amd")

    monkeypatch.setattr(backends, "open_system", refuse)
    result = cli("verify", "--backend", "kvm")
    assert result.status == 2
    assert result.error == "lasskvm: this host has no /dev/kvm; load kvm_intel or kvm_amd"
