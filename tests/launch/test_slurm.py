"""A real Slurm on this machine: munged, slurmctld and slurmd, started by slurm/one-machine."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from commands import ROOT, Bench, until

from bench.store.locks import is_alive

SCRIPT = ROOT / "slurm" / "one-machine"
GOLDEN = ROOT / "tests" / "data" / "step.sbatch"
MISSING = [
    p
    for p in ("munged", "slurmctld", "slurmd", "sbatch")
    if shutil.which(p, path=f"{os.environ['PATH']}:/usr/sbin:/sbin") is None
]

pytestmark = pytest.mark.skipif(
    bool(MISSING), reason=f"not installed: {', '.join(MISSING)} (Debian's packages slurm-wlm and munge)"
)


def one_machine(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, SCRIPT, *arguments], capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A Slurm under way; its slurm.conf. Afterwards nothing of it runs."""
    folder = tmp_path_factory.mktemp("slurm")
    started = one_machine("start", folder)
    assert started.returncode == 0, started.stderr
    pids = [int((folder / f"{name}.pid").read_text()) for name in ("munged", "slurmctld", "slurmd")]
    assert all(map(is_alive, pids))
    again = one_machine("start", folder)
    assert (again.returncode, again.stderr.count("\n")) == (1, 1)
    yield folder / "slurm.conf"
    stopped = one_machine("stop", folder)
    assert stopped.returncode == 0, stopped.stderr
    assert not any(map(is_alive, pids))
    assert not list(folder.glob("*.pid"))


class Cluster(Bench):
    """`bench … --cluster slurm`, on a cluster without accounting: whoever asks sacct leaves a trace."""

    @classmethod
    def of(cls, bench: Bench, configuration: Path) -> Cluster:
        bench.__class__ = cls
        assert isinstance(bench, cls)
        tools = bench.folder / "tools"
        tools.mkdir()
        (tools / "sacct").write_text(f"#!/bin/sh\ntouch {bench.folder}/sacct-was-asked\nexit 1\n")
        (tools / "sacct").chmod(0o755)
        bench.environment |= {
            "SLURM_CONF": str(configuration),
            "PATH": f"{tools}:{bench.environment['PATH']}",
        }
        return bench

    def plan(self, methods: str, *more: str, protocol: str | None = None) -> list[str]:
        return super().plan(
            methods, "--cluster", "slurm", "--profile", "one-machine", *more, protocol=protocol
        )

    def slurm(self, *words: str) -> str:
        return subprocess.run(words, env=self.environment, capture_output=True, text=True, check=True).stdout

    def queue(self) -> list[str]:
        """Jobs that wait or run."""
        return self.slurm("squeue", "-h", "-o", "%i").split()

    def job_id(self, key: str) -> str:
        submission = self.store.state(key).submission
        assert submission is not None
        return str(submission.id)


@pytest.fixture
def slurm(command: Bench, cluster: Path) -> Iterator[Cluster]:
    bench = Cluster.of(command, cluster)
    yield bench
    for job_id in bench.queue():
        bench.slurm("scancel", job_id)
    until(lambda: not bench.queue(), "an empty queue")
    assert not (bench.folder / "sacct-was-asked").exists()


def test_a_detached_smoke_run_says_where_it_is_watched(slurm: Cluster) -> None:
    status, _, error = slurm("run", *slurm.one_step("--smoke", "--detach"))
    assert status == 0, error
    assert error.splitlines()[-1].endswith("watch them with: bench status --smoke --watch")


def test_a_detached_run_is_watched_adopted_and_finished(slurm: Cluster) -> None:
    hold = slurm.hold(0)
    words = slurm.plan("brittle")
    status, _, error = slurm("run", *words, "--detach")
    assert status == 0, error
    assert error.splitlines()[-1] == "2 jobs are in the queue; watch them with: bench status --watch"
    first, second = slurm.keys("brittle")
    slurm.held(0)
    status, out, _ = slurm("status", "--json")
    rows = json.loads(out)
    assert [(row["state"], row["slurm_state"], row["slurm_reason"]) for row in rows] == [
        ("running", "RUNNING", ""),
        ("submitted", "PENDING", "Dependency"),
    ]
    assert "training, epoch 1/2" in slurm("status")[1]
    watching = slurm.start("status", "--watch")

    jobs = [slurm.job_id(key) for key in (first, second)]
    driver = slurm.start("run", *words)
    assert driver.stderr is not None
    assert [driver.stderr.readline().split()[0] for _ in range(2)] == ["adopted", "adopted"]
    hold.unlink()
    status, out, error = slurm.finish(driver)
    assert status == 0, error
    assert "Brittle" in out
    assert jobs == [
        re.sub(r"\D.*", "", next(slurm.store.logs(key).glob("*_submission.sh")).name)
        for key in (first, second)
    ]  # none was sent twice
    assert len(slurm.begun()) == 4
    status, out, _ = slurm.finish(watching)
    assert status == 0
    assert "2 done" in out

    script = next(slurm.store.logs(second).glob("*_submission.sh")).read_text()
    for concrete, name in (
        (re.escape(str(slurm.store.logs(second))), "LOGS"),
        (re.escape(sys.executable), "PYTHON"),
        (f"PYTHONPATH={re.escape(str(ROOT))}.*", "PYTHONPATH=PACKAGE"),
        (f"afterok:{jobs[0]}$", "afterok:PARENT"),
    ):
        script = re.sub(concrete, name, script, flags=re.MULTILINE)
    assert script == GOLDEN.read_text()


def test_a_failing_job_takes_only_its_descendants_out_of_the_queue(slurm: Cluster) -> None:
    (slurm.folder / "fail-0").touch()
    status, _, error = slurm("run", *slurm.plan("brittle,ft"))
    assert status == 1
    key = slurm.keys("brittle")[0]
    failure = slurm.store.state(key).failure
    assert failure is not None
    log = failure.log
    assert "seed 0 step 0: RuntimeError: asked to fail at step 0" in error
    assert f"log: {log}" in error
    assert "asked to fail at step 0" in Path(log).read_text()
    assert "1 jobs were not run because a step before them failed" in error
    assert list(slurm.status().values()) == ["failed", "waiting", "done", "done"]
    until(lambda: not slurm.queue(), "an empty queue")
    assert (
        slurm.slurm("squeue", "-h", "-t", "all", "-j", slurm.job_id(key), "-o", "%T").strip() == "FAILED"
    )  # the exit status says so too


def test_jobs_that_are_stopped_put_back_or_cancelled_go_on(slurm: Cluster) -> None:
    hold = slurm.hold(0)
    words = slurm.plan("brittle")
    driver = slurm.start("run", *words)
    slurm.held(0)
    driver.send_signal(signal.SIGINT)
    status, _, error = slurm.finish(driver)
    assert status == 130
    assert error.splitlines()[-1] == "stopped; run the same command again to resume"
    until(lambda: not slurm.queue(), "an empty queue")
    assert list(slurm.status().values()) == ["interrupted", "waiting"]

    driver = slurm.start("run", *words)
    first, second = (slurm.held(0), slurm.keys("brittle")[1])
    until(lambda: len(slurm.begun()) == 3, "its second epoch, again")
    jobs = [slurm.job_id(key) for key in (first, second)]
    slurm.slurm("scancel", "--signal=USR2", jobs[0])  # what comes before a time limit
    until(
        lambda: slurm.slurm("squeue", "-h", "-j", jobs[0], "-o", "%T %r").split() == ["PENDING", "BeginTime"],
        "the job back in the queue",
    )
    slurm.slurm("scancel", jobs[1])
    assert list(slurm.status().values()) == ["submitted", "waiting"]
    hold.unlink()
    slurm.slurm("scontrol", "update", f"JobId={jobs[0]}", "StartTime=now")
    status, _, error = slurm.finish(driver)
    assert status == 1
    assert (
        f"resuming {first}: phase 0, 1 epochs done"
        in (slurm.store.logs(first) / f"{jobs[0]}_0_log.out").read_text()
    )
    assert f"step 1: SLURM job {jobs[1]} ended without a result: CANCELLED; last words: none" in error
    assert error.count("FAILED") == 2  # as it happens, and at the end
    assert list(slurm.status().values()) == ["done", "failed"]

    status, _, error = slurm("run", *words)
    assert status == 0, error


def test_children_of_a_job_that_rides_along_follow_its_leader(slurm: Cluster) -> None:
    status, _, error = slurm("run", *slurm.plan("ft,ewc"))
    assert status == 0, error
    assert list(slurm.status().values()) == ["done"] * 4
    leader = slurm.keys("ewc")[0]
    for key in (slurm.keys("ft")[1], slurm.keys("ewc")[1]):
        script = next(slurm.store.logs(key).glob("*_submission.sh")).read_text()
        parent = next(slurm.store.logs(leader).glob("*_submission.sh")).name.partition("_")[0]
        assert re.search(
            rf"^#SBATCH --dependency=afterok:{parent.removesuffix('.sh')}$", script, re.MULTILINE
        )
    assert not list(slurm.store.logs(slurm.keys("ft")[0]).glob("*_submission.sh"))


def test_what_the_cluster_refuses_is_said_in_one_line(slurm: Cluster) -> None:
    for text, words in (
        (
            'partition = "nowhere"\ngpus = 0\n',
            "sbatch refused brittle step 0: sbatch: error: invalid partition specified: nowhere",
        ),
        ("gpus = 3\n", "batch_size = 4 of brittle, step 0, does not divide by the profile's gpus = 3"),
    ):
        (slurm.folder / "mine.toml").write_text(text)
        status, _, error = slurm("run", *slurm.one_step("--profile", "mine.toml"))
        assert status == 2
        assert error.startswith(f"bench: error: {words}")
        assert error.count("\n") == 1
    configuration = slurm.environment["SLURM_CONF"]
    (slurm.folder / "broken.conf").write_text("Nonsense=1\n")
    slurm.environment["SLURM_CONF"] = str(slurm.folder / "broken.conf")
    status, _, error = slurm("run", *slurm.one_step())
    slurm.environment["SLURM_CONF"] = configuration
    assert status == 2
    assert error.startswith("bench: error: --cluster slurm: no answer: squeue: ")
    assert error.count("\n") == 1


def test_a_command_runs_on_a_cluster_of_its_own(tmp_path: Path) -> None:
    done = one_machine(
        "run", tmp_path / "s", "--", "srun", "sh", "-c", "echo $SLURM_JOB_ID $SLURM_CONF; exit 3"
    )
    assert (done.returncode, done.stdout) == (3, f"1 {tmp_path / 's' / 'slurm.conf'}\n"), done.stderr
    assert not list((tmp_path / "s").glob("*.pid"))
    too_long = one_machine("start", tmp_path / ("x" * 100))
    assert (too_long.returncode, too_long.stderr.count("\n")) == (1, 1)
    assert "the path is too long for a socket" in too_long.stderr
