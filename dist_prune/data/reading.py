"""Files read by several threads, ahead of whoever wants them: over a network opening one takes milliseconds."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import numpy.typing as npt

from dist_prune.data.dataset import Split

THREADS = 16
PIECE = 4  # images that a thread reads in one go
Encoded = list[npt.NDArray[np.uint8]]


class ReadAhead:
    """Hands over one batch of encoded images after the other, and reads the next ones meanwhile.

    A call raises StopIteration after the last batch, and OSError, which names the file, where one cannot be read.
    """

    def __init__(self, split: Split, batches: Iterable[Sequence[int]]) -> None:
        self.split, self.batches = split, iter(batches)
        self._pool = ThreadPoolExecutor(THREADS)
        self._read: deque[tuple[Sequence[int], list[Future[Encoded]]]] = deque()

    def __call__(self) -> tuple[Encoded, list[npt.NDArray[np.int64]]]:
        """One batch: the bytes of each image, and its position, (1,)."""
        while len(self._read) < 2 or sum(len(places) for places, _ in self._read) < 2 * THREADS * PIECE:
            if (places := next(self.batches, None)) is None:
                break
            pieces = [places[start : start + PIECE] for start in range(0, len(places), PIECE)]
            self._read.append((places, [self._pool.submit(self._read_files, piece) for piece in pieces]))
        if not self._read:
            raise StopIteration
        places, reading = self._read.popleft()
        return [image for piece in reading for image in piece.result()], [np.array([place]) for place in places]

    def _read_files(self, places: Sequence[int]) -> Encoded:
        return [np.frombuffer(self.split.extent(place).read(), np.uint8) for place in places]
