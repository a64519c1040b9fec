"""Jobs of users: training in the background, by workers of any number of processes."""

from controlprefix.jobs.worker import JobWorker

__all__ = ["JobWorker"]
