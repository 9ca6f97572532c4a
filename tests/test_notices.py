"""Warnings that do not fill the log."""

from __future__ import annotations

import logging

import pytest

from dsv4 import notices
from dsv4.notices import SparseLog


def test_of_what_happens_often_one_warning_a_minute_is_logged(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1000.0
    monkeypatch.setattr(notices.time, "monotonic", lambda: now)
    log = SparseLog(logging.getLogger("dsv4.server"))
    for step, line in ((0, "first, of 5%"), (59, "second"), (2, "third"), (1, "fourth")):
        now += step
        log.warn(line)
    assert caplog.messages == ["first, of 5%", "third"]
