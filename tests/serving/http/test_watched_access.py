"""Keys that follow their file."""

import logging
import os
import time

import pytest

from fastprompt.serving.http.watched_access import LOOK_SECONDS, WatchedAccess

FILE = '[[keys]]\nname = "one"\nkey = "{}"\nprompts = ["*"]\n'
OLD, NEW = (f"a-key-that-is-{age}-0123" for age in ("old", "new"))


@pytest.fixture
def keys(tmp_path):
    path = tmp_path / "keys.toml"
    path.write_text(FILE.format(OLD))
    return path


def allowed(access: WatchedAccess, key: str) -> bool:
    return access.authenticate(f"Bearer {key}".encode()) is not None


def test_a_file_that_changes_is_read_again_and_one_that_is_wrong_is_not_taken(keys, caplog):
    now = 0.0
    access = WatchedAccess(keys, clock=lambda: now)
    assert allowed(access, OLD)
    keys.write_text(FILE.format(NEW))
    assert allowed(access, OLD)  # within the second
    now += LOOK_SECONDS
    assert not allowed(access, OLD) and allowed(access, NEW)
    with caplog.at_level(logging.ERROR, "fastprompt.serving"):
        for wrong in ("", "[[keys]", None):
            keys.write_text(wrong) if wrong is not None else keys.unlink()
            for _ in range(3):
                now += LOOK_SECONDS
                assert allowed(access, NEW) and not access.open
            assert "the keys stay as they were" in caplog.text
            caplog.clear()
    other = keys.with_name("other")
    other.write_text(FILE.format(OLD))
    os.replace(other, keys)
    now += LOOK_SECONDS
    assert allowed(access, OLD) and not allowed(access, NEW)


def test_a_file_that_stays_is_not_read_again(keys, monkeypatch):
    now, past = 0.0, time.time() - 60
    os.utime(keys, (past, past))
    access = WatchedAccess(keys, clock=lambda: now)
    allowed(access, OLD)
    monkeypatch.setattr(access, "reload", lambda: pytest.fail("it was read again"))
    for _ in range(3):
        now += LOOK_SECONDS
        assert allowed(access, OLD)


def test_without_a_file_there_is_nothing_to_look_at():
    assert WatchedAccess(None).open
    assert allowed(WatchedAccess(None, (OLD,)), OLD)
