"""Commands about jobs: worker, jobs."""

import signal
from functools import partial
from typing import Annotated, Any

import typer
from rich.table import Column, Table

from controlprefix.cli.common import app, err, jobs_app, out, print_table
from controlprefix.cli.groups import EngineArguments, StoreArguments, grouped


@app.command()
@partial(grouped, without=["tenant"])
def worker(
    until_empty: Annotated[
        bool, typer.Option(help="Stop when there is nothing left to do.")
    ] = False,
    *,
    engine: EngineArguments,
) -> None:
    """Run the training jobs that servers have queued, of all tenants, until it is stopped."""
    from controlprefix.jobs import JobWorker

    cp = engine.open(create=True)
    jobs = JobWorker(cp.frozen_model, cp.store, cp.attributes)

    def stop(*_: Any) -> None:
        err.print("stopping after the current training step")
        jobs.ask_to_stop()

    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, stop)
    out.print(f"doing the jobs of all tenants in {cp.store.display_name}")
    num_done = jobs.run(until_empty=until_empty)
    out.print(f"{num_done} jobs done")
    if num_others := cp.store.num_jobs_of_other_models(cp.geometry.fingerprint):
        out.print(f"{num_others} jobs wait for a worker with another --model")


@jobs_app.command("list")
@grouped
def list_jobs(
    user: Annotated[str | None, typer.Option(help="Only jobs of this user.")] = None,
    *,
    store: StoreArguments,
) -> None:
    """List a tenant's jobs, the newest first."""
    names = ("kind", "user", "status", "created", "steps", "version", "error")
    table = Table(Column("job", no_wrap=True, min_width=32), *names)
    with store.open_store() as opened:
        for job in opened.jobs(user=user):
            version = "" if job.version is None else str(job.version)
            created = f"{job.created_at:%Y-%m-%d %H:%M}"
            status, steps = job.status, str(job.num_steps)
            table.add_row(job.id, job.kind, job.user, status, created, steps, version, job.error)
    print_table(table, empty="there are no jobs")


@jobs_app.command("cancel")
@grouped
def cancel_job(
    job_id: Annotated[str, typer.Argument(help="Id of the job.")], *, store: StoreArguments
) -> None:
    """Cancel a job; one that runs ends after its current training step."""
    with store.open_store() as opened:
        job = opened.cancel_job(job_id)
    out.print(f"{job.id}: {job.status}")
