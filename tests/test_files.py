"""Files and folders appear whole or not at all."""

import os
import stat

import pytest

from skipdit.files import written_whole


def test_an_old_folder_survives_what_fails(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "weights").write_text("old")
    with pytest.raises(RuntimeError), written_whole(folder) as temporary:
        temporary.mkdir()
        raise RuntimeError
    with pytest.raises(OSError), written_whole(folder):
        pass  # nothing was written
    assert (folder / "weights").read_text() == "old" and os.listdir(tmp_path) == ["model"]


def test_a_folder_survives_a_rename_that_fails(tmp_path, monkeypatch):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "weights").write_text("old")

    def refuse(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OSError, match="No space"), written_whole(folder) as temporary:
        temporary.mkdir()
    assert (folder / "weights").read_text() == "old" and os.listdir(tmp_path) == ["model"]


def test_replaced_whole_and_readable_by_all(tmp_path):
    folder = tmp_path / "model"
    for text in ("old", "new"):
        with written_whole(folder) as temporary:
            temporary.mkdir()
            (temporary / "weights").write_text(text)
            (temporary / "weights").chmod(0o600)  # as safetensors does
    assert (folder / "weights").read_text() == "new"
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE((folder / "weights").stat().st_mode) == 0o666 & ~mask
