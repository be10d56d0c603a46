"""Files are written whole on file systems that flush no folders, and only their refusal is overlooked."""

import errno
import os
from pathlib import Path

import pytest

from dist_prune.utils.files import CheckpointError, write_text


def refusing(monkeypatch: pytest.MonkeyPatch, number: int, folders: bool) -> None:
    """`fsync` of folders, or of files, says so."""
    sync = os.fsync

    def fsync(descriptor: int) -> None:
        if Path(f"/proc/self/fd/{descriptor}").is_dir() == folders:
            raise OSError(number, os.strerror(number))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP])
def test_a_folder_that_cannot_be_flushed_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    refusing(monkeypatch, number, folders=True)
    write_text(tmp_path / "a.txt", "whole")
    assert (tmp_path / "a.txt").read_text() == "whole"


@pytest.mark.parametrize(("number", "folders"), [(errno.EIO, True), (errno.EINVAL, False), (errno.EIO, False)])
def test_other_refusals_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, folders: bool) -> None:
    refusing(monkeypatch, number, folders)
    with pytest.raises(CheckpointError, match=r"a\.txt: could not be written"):
        write_text(tmp_path / "a.txt", "whole")
