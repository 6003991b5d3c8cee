"""Campaigns: many cases on several processes."""

from __future__ import annotations

import secrets
import warnings

import pytest

from lasskvm.fuzz.campaign import Campaign, Summary, _Worker, run_campaign, run_cases
from lasskvm.fuzz.judging import Kind
from lasskvm.fuzz.paths import PathKind

WORKERS = 2
SECONDS = 900
#: Unexplained mismatches that a fresh seed may find.
TOLERATED = 3


def assert_explained(summary: Summary, campaign: Campaign) -> None:
    found = [(finding.index, finding.group) for finding in summary.findings]
    assert not found, f"seed {campaign.seed}: lasskvm fuzz --seed {campaign.seed} --cases {campaign.cases}"
    assert summary.cases == campaign.cases


@pytest.mark.slow
@pytest.mark.timeout(SECONDS)
def test_paths_agree_on_twenty_thousand_cases() -> None:
    campaign = Campaign("1", 20_000)
    summary = run_campaign(campaign, WORKERS)
    assert_explained(summary, campaign)
    # It has reached what it is for.
    assert summary.kinds[Kind.AGREED] > 0.9 * campaign.cases
    assert all(summary.vectors[vector] > 20 for vector in (0, 1, 3, 6, 7, 12, 13, 14, 17))


@pytest.mark.slow
@pytest.mark.timeout(SECONDS)
def test_paths_agree_on_fresh_cases() -> None:
    """Fresh cases still find a rare form now and then (about three in 50,000): those are told, more of them fail."""
    campaign = Campaign(secrets.token_hex(4), 5_000)
    summary = run_campaign(campaign, WORKERS)
    assert summary.cases == campaign.cases
    found = [(finding.index, finding.group) for finding in summary.findings]
    if found:
        warnings.warn(f"seed {campaign.seed}: unexplained {found}", stacklevel=1)
    assert len(found) <= TOLERATED, f"lasskvm fuzz --seed {campaign.seed} --cases {campaign.cases}: {found}"


@pytest.mark.parametrize("kind", [PathKind.JIT, PathKind.EMULATOR])
def test_a_path_agrees_with_itself(kind: PathKind) -> None:
    summary = run_cases(Campaign("self", 300, (kind, kind)), range(300))
    assert not summary.findings
    assert summary.kinds[Kind.EXPLAINED] == 0


def test_result_does_not_depend_on_the_number_of_workers() -> None:
    campaign = Campaign("workers", 600, (PathKind.EMULATOR, PathKind.EMULATOR))
    alone, together = run_campaign(campaign, 1), run_campaign(campaign, 3)
    assert (alone.kinds, alone.modes, alone.vectors) == (together.kinds, together.modes, together.vectors)


def test_progress_ends_with_all_cases() -> None:
    seen: list[int] = []
    run_campaign(Campaign("progress", 300, (PathKind.EMULATOR, PathKind.EMULATOR)), 2, seen.append)
    assert seen == sorted(seen)
    assert seen[-1] == 300


def test_worker_that_dies_is_replaced_and_its_case_is_known() -> None:
    worker = _Worker(Campaign("death", 1000, (PathKind.EMULATOR, PathKind.EMULATOR)))
    try:
        worker.begin(range(100, 1000))
        worker._process.kill()
        worker._process.join()
        assert worker.result() is None
        died_at = worker.replace()
        assert 100 <= died_at < 1000
        assert sum(len(part) for part in worker.rest_of(died_at)) == 899
        worker.begin(range(4))
        assert worker._pipe.poll(120)
        result = worker.result()
        assert result is not None
        assert result.cases == 4
    finally:
        worker.close()
