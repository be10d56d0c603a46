"""One process in a folder at a time, on shared file systems as well."""

from __future__ import annotations

import errno
import fcntl
import itertools
import json
import os
import socket
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from dist_prune.utils.files import CheckpointError
from dist_prune.utils.text import read_text, write_text

LOCK, OWNER = "lock", "owner.json"
BEAT_S = 1.0  # how often the owner shows that it lives
SILENT_S = 8.0  # after which an owner that the kernel knows nothing of counts as gone
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


class Lock:
    """A hold on a folder, which ends with the process, however that ends.

    It is a record lock of the kernel, which most shared file systems carry to other hosts. Some do not, or only
    say so: hence the owner also counts in a file, and a newcomer on another host looks whether it still counts.
    """

    def __init__(self, folder: Path, patience_s: float = 0.0) -> None:
        """Take hold of the folder, waiting `patience_s` for another's hold to end.

        Raises:
            CheckpointError: another process has it, which is named.
        """
        self._owner = folder / OWNER
        self._file = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        deadline = time.monotonic() + patience_s
        while self._is_taken():
            if time.monotonic() > deadline:
                os.close(self._file)
                raise CheckpointError(f"--run-dir {folder} is in use by {_named(self._read())}: wait for its end")
            time.sleep(BEAT_S / 4)
        self._over = threading.Event()
        self._beat(0)
        self._thread = threading.Thread(target=self._beats, daemon=True)
        self._thread.start()

    def release(self) -> None:
        """Let go."""
        self._over.set()
        self._thread.join(timeout=BEAT_S)
        self._owner.unlink(missing_ok=True)
        os.close(self._file)

    def _is_taken(self) -> bool:
        """By a process that the kernel knows of, or, where that cannot be, by one that still counts."""
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            knows_all = self._read().get("host") in (None, socket.gethostname())
        except OSError as error:
            if error.errno not in NO_LOCKS:
                return True
            knows_all = False
        return not knows_all and self._counts()

    def _counts(self) -> bool:
        before, deadline = self._read(), time.monotonic() + SILENT_S
        while before and time.monotonic() < deadline:
            time.sleep(BEAT_S / 4)
            if self._read() != before:
                return True
        return False

    def _read(self) -> dict[str, Any]:
        """What the owner wrote last; opened again each time, as network file systems compare then."""
        with suppress(OSError, ValueError):
            found = json.loads(read_text(self._owner))
            return found if isinstance(found, dict) else {}
        return {}

    def _beats(self) -> None:
        for beat in itertools.count(1):
            if self._over.wait(BEAT_S):
                return
            with suppress(OSError):  # a disk that is full for a moment
                self._beat(beat)

    def _beat(self, beat: int) -> None:
        """Renamed into place, so that no newcomer reads an empty file; not flushed, as it ends with the host."""
        aside = self._owner.with_name(f".{OWNER}.{os.getpid()}")
        write_text(aside, json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "beat": beat}))
        aside.rename(self._owner)


def _named(owner: dict[str, Any]) -> str:
    return f"process {owner['pid']} on {owner['host']}" if owner else "another process"
