"""A file is written next to the old one, which an error leaves unchanged."""

import os

import pytest

from autoclip_core import ClipLog
from autoclip_core.files.replace_file import open_replacement


def test_the_new_file_replaces_the_old_one_at_the_end(tmp_path):
    path = tmp_path / "run.csv"
    path.write_text("old")
    path.chmod(0o640)
    with open_replacement(path) as file:
        file.write("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert path.stat().st_mode & 0o777 == 0o640
    assert os.listdir(tmp_path) == ["run.csv"]


def test_an_error_leaves_the_old_file_and_nothing_beside_it(tmp_path):
    path = tmp_path / "run.csv"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt):
        write_and_stop(path)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["run.csv"]


def write_and_stop(path):
    with open_replacement(path) as file:
        file.write("new")
        raise KeyboardInterrupt


@pytest.mark.parametrize("method", ["to_csv", "to_jsonl"])
def test_a_log_is_written_so(tmp_path, monkeypatch, method):
    path = tmp_path / "run.log"
    path.write_text("old")
    log = ClipLog()
    log.record(norm=1.0, threshold=2.0)
    monkeypatch.setattr(os, "replace", lambda *paths: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        getattr(log, method)(path)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["run.log"]


def test_a_link_is_followed_and_a_device_is_written_directly(tmp_path):
    (tmp_path / "target").write_text("old")
    (tmp_path / "link").symlink_to("target")
    with open_replacement(tmp_path / "link") as file:
        file.write("new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "target").read_text() == "new"
    with open_replacement(os.devnull) as file:
        file.write("new")
    assert not os.path.isfile(os.devnull)


def test_an_error_names_the_path_that_was_given(tmp_path):
    path = str(tmp_path / "no" / "run.csv")
    with pytest.raises(FileNotFoundError) as caught, open_replacement(path):
        pass
    assert caught.value.filename == path


def test_an_error_names_the_file_that_is_written():
    with pytest.raises(OSError, match="No space left") as raised:
        with open_replacement("/dev/full") as file:
            file.write("new")
    assert raised.value.filename == "/dev/full"
