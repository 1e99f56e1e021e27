"""`bench plan`: which jobs a run consists of, which are shared, done, or trained along with another."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pydantic import JsonValue
from tabulate import tabulate

from bench.commands import options
from bench.launch.siblings import leaders, source_of
from bench.plan.plan import Job, Plan
from bench.store.results import Store

EXAMPLES = """examples:
  bench plan --protocol voc-15-1 --methods ft,lwf,mib,plop,ssul --track controlled
  bench plan --protocol ade-100-5 --methods mib@preset --json"""
HEADERS = ["job", "protocol", "track", "method", "step", "seed", "images", "iterations", "state", ""]


def add(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    options.add_plan_options(parser)
    parser.add_argument("--force", action="store_true", help="as in bench run")
    options.add_json_option(parser)


def run(args: argparse.Namespace) -> int:
    """Print the plan."""
    plan = options.plan_of(args)
    known = outlook(plan, Store(args.results, args.smoke), args.force)
    print(json.dumps(plan_json(plan, known), indent=1) if args.json else plan_text(plan, known))
    return 0


@dataclass(frozen=True)
class Outlook:
    """What a run of a plan would do.

    Attributes:
        states: of each job now, a word of bench.store.results.STATES.
        riding: the sibling that a job is trained along with.
        sources: the done sibling that a job's result is cut out of.
        force: what is done is trained again.
    """

    states: Mapping[str, str]
    riding: Mapping[str, str]
    sources: Mapping[str, str]
    force: bool = False

    def undone(self, key: str) -> bool:
        """Whether a run would make the job's result."""
        return self.force or self.states[key] != "done"

    def trained(self, key: str) -> bool:
        """Whether a run would train for this job."""
        return self.undone(key) and key not in self.riding and key not in self.sources

    def word(self, key: str) -> str:
        """The state for people."""
        state = self.states[key]
        return f"{state}, again" if self.force and state == "done" else state


def outlook(plan: Plan, store: Store, force: bool = False) -> Outlook:
    """What a run of a plan would do in a results folder."""
    known = store.keys()
    states = {key: store.state(key).state if key in known else "waiting" for key in plan.jobs}
    left = [key for key, state in states.items() if force or state != "done"]
    sources = {}
    if not force:
        found = {key: source_of(plan, key, lambda other: states[other] == "done") for key in left}
        sources = {key: source for key, source in found.items() if source is not None}
    return Outlook(states, leaders(plan, [key for key in left if key not in sources]), sources, force)


def plan_json(plan: Plan, known: Outlook) -> dict[str, JsonValue]:
    """The jobs of a plan, and the chains that use them."""
    jobs: list[JsonValue] = [
        {
            "key": job.key,
            "parent": job.parent,
            "method": job.method,
            "data_set": job.protocol.dataset.name,
            "step": job.step,
            "seed": job.seed,
            "images": job.images,
            "iterations": job.iterations,
            "state": known.states[key],
            "with": known.riding.get(key),
            "cut_from": known.sources.get(key),
            "used_by": [chain.place(job.step) for chain in plan.users(key)],
            "inputs": job.inputs.model_dump(mode="json"),
        }
        for key, job in plan.jobs.items()
    ]
    chains: list[JsonValue] = [
        {
            "protocol": chain.protocol.label,
            "track": chain.track,
            "method": chain.method,
            "seed": chain.seed,
            "jobs": list(chain.keys),
        }
        for chain in plan.chains
    ]
    return {"jobs": jobs, "chains": chains}


@dataclass(frozen=True)
class _Alike:
    """What jobs of one row share: all but the seed."""

    protocols: tuple[str, ...]
    track: str
    method: str
    step: int
    images: int
    iterations: int
    methods: tuple[str, ...]


def plan_text(plan: Plan, known: Outlook) -> str:
    """One row a job; jobs that differ in their seed alone share a row."""
    alike: dict[_Alike, list[str]] = {}
    for key, job in plan.jobs.items():
        alike.setdefault(_alike(plan, job), []).append(key)
    rows = [_row(plan, known, same, keys) for same, keys in alike.items()]
    table = tabulate(rows, headers=HEADERS, tablefmt="plain", disable_numparse=True)
    return "\n".join([table, *(f"WARNING: {warning}" for warning in plan.warnings), _summary(plan, known)])


def _alike(plan: Plan, job: Job) -> _Alike:
    users = plan.users(job.key)
    methods = tuple(sorted({chain.method for chain in users}))
    protocols = tuple(sorted({chain.protocol.label for chain in users} or {job.protocol.label}))
    track = users[0].track if users else ""
    return _Alike(protocols, track, job.method, job.step, job.images, job.iterations, methods)


def _row(plan: Plan, known: Outlook, same: _Alike, keys: Sequence[str]) -> list[str | int]:
    shared = [", ".join(names) for names in (same.methods, same.protocols) if len(names) > 1]
    words = [f"shared by {' in '.join(shared)}"] if shared else []
    records = sorted(plan.jobs[keys[0]].part.recorders)
    if records:
        words.append(f"records {', '.join(records)}")
    for word, others in (("with", known.riding), ("cut out of", known.sources)):
        named = [others[key] for key in keys if key in others]
        if len(keys) == 1:
            words += [f"{word} {key}" for key in named]
        elif named:
            methods = {chain.method for key in named for chain in plan.users(key)}
            words.append(f"{word} {'that' if len(named) == 1 else 'those'} of {', '.join(sorted(methods))}")
    return [
        keys[0] if len(keys) == 1 else f"{len(keys)} jobs",
        same.protocols[0] + (" …" if len(same.protocols) > 1 else ""),
        same.track,
        same.method,
        same.step,
        ",".join(str(plan.jobs[key].seed) for key in keys),
        same.images,
        same.iterations,
        _counted([known.word(key) for key in keys]),
        "; ".join(words),
    ]


def _summary(plan: Plan, known: Outlook) -> str:
    undone = [key for key in plan.jobs if known.undone(key)]
    trained = [key for key in undone if known.trained(key)]
    steps = sum(len(chain.keys) for chain in plan.chains)
    counts = f"{len(plan.jobs) - len(undone)} done, {len(trained)} to train"
    if len(undone) > len(trained):
        counts += f" ({len(undone) - len(trained)} come with them or with what is done)"
    iterations = sum(plan.jobs[key].iterations for key in trained)
    jobs = f"{len(plan.jobs)} jobs for {steps} steps of {len(plan.chains)} chains"
    return f"{jobs}; {counts}, {iterations} iterations"


def _counted(words: Sequence[str]) -> str:
    """["done", "done", "waiting"] as "2 done 1 waiting"; a single word stands alone."""
    if len(words) == 1:
        return words[0]
    return " ".join(f"{words.count(word)} {word}" for word in dict.fromkeys(words))
