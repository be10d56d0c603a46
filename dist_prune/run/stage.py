"""Images on a disk of each node's own, before anything reads them."""

from __future__ import annotations

from dataclasses import replace

from dist_prune.data.dataset import Split
from dist_prune.data.stage import staged
from dist_prune.run.job import Job


def stage_images(job: Job) -> Job:
    """The run, with all its images where `--stage` says; as it is without.

    Raises:
        DataError: images are not packed, or there is no room.
    """
    folder = job.config.stage
    if folder is None:
        return job

    def there(split: Split) -> Split:
        return staged(split, folder, job.world) if split.files else split

    with job.report.phase("staging"):
        dataset = replace(job.dataset, train=there(job.dataset.train), val=there(job.dataset.val))
        return replace(job, dataset=dataset, unlabelled=job.unlabelled and there(job.unlabelled))
