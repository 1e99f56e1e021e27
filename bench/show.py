"""What `bench list`, `show` and `plan` say: first as data, then as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tabulate import tabulate

from bench import protocol as protocols
from bench import shipped
from bench.data.dataset import Dataset, dataset_names, load_dataset, locate
from bench.data.index import ClassIndex, class_indexes, read_class_index
from bench.errors import UserError
from bench.plan import Plan
from bench.recipe import TRACKS, overrides_for, parse_overrides, resolve, with_models
from bench.registry import method, method_names
from bench.store import Store

# ---- list ----------------------------------------------------------------------------------------------------------------


def catalogue(what: str) -> list[dict[str, Any]]:
    """Rows of `bench list`."""
    if what == "protocols":
        loaded = [protocols.load(name) for name in protocols.names()]
        return [
            {
                "name": p.name,
                "data set": p.dataset.name,
                "steps": len(p.groups),
                "classes": "+".join(_runs([len(g) for g in p.groups])),
                "title": p.title,
            }
            for p in loaded
        ]
    if what == "methods":
        rows = []
        for name in method_names():
            spec = method(name if not _wraps(name) else f"{name}+ft")
            variants = sorted(v for path, recipe in spec.recipes for v in recipe.get("variant", {}) if path.stem.replace("_", "-") == name)
            known = sorted({k for _, recipe in with_models(spec.recipes[-1:]) for k in recipe.get("published", {}) if k in dataset_names()})
            rows.append(
                {
                    "name": f"{name}+METHOD" if spec.cls.wraps else name,
                    "title": spec.cls.title,
                    "published recipes": ", ".join(known) or "-",
                    "variants": ", ".join(f"@{v}" for v in variants) or "-",
                    "paper": spec.cls.paper or "-",
                    "notes": "; ".join(spec.cls.caveats),
                }
            )
        return rows
    if what == "datasets":
        return [
            {"name": name, "classes": len(load_dataset(name).classes) - 1, "track": load_dataset(name).track, "title": load_dataset(name).title}
            for name in dataset_names()
        ]
    if what == "networks":
        from bench.models.build import NETWORKS

        return [{"name": name, "what": kind.says} for name, kind in sorted(NETWORKS.items())]
    if what == "conventions":
        from bench.metrics import CONVENTIONS

        return [{"name": name, "what": how.says} for name, how in CONVENTIONS.items()]
    if what == "tracks":
        says = {
            "published": "each method as its authors ran it: network, schedule, batch, crop, label rule, selection",
            "controlled": "one network, schedule, crop and label rule for all, so that only the method differs",
            "small": "one small network, small crops, few epochs: for a laptop, CI and method development",
        }
        return [{"name": name, "what": says[name]} for name in TRACKS]
    return [{"name": path.stem, "file": str(path)} for path in sorted(shipped.folder("slurm").glob("*.toml"))]


def _wraps(name: str) -> bool:
    try:
        return method(name).cls.wraps
    except UserError:
        return True


def _runs(sizes: Sequence[int]) -> list[str]:
    """[15, 1, 1, 1] as ["15", "3x1"]."""
    out: list[list[int]] = []
    for size in sizes:
        if out and out[-1][1] == size:
            out[-1][0] += 1
        else:
            out.append([1, size])
    return [str(size) if n == 1 else f"{n}x{size}" for n, size in out]


def catalogue_text(what: str, rows: Sequence[Mapping[str, Any]]) -> str:
    rows = [{k: v for k, v in row.items() if any(r.get(k) for r in rows)} for row in rows]
    return tabulate([dict(row) for row in rows], headers="keys", tablefmt="plain")


# ---- show protocol -------------------------------------------------------------------------------------------------------


def protocol_data(
    name: str, setting: str | None = None, data_root: str | None = None, index_file: str | None = None, indices: bool = False
) -> dict[str, Any]:
    """A protocol expanded, with image counts per step when the data or a class index is there."""
    p = protocols.load(name, setting)
    index = _indexes(p.dataset, data_root, index_file)
    if indices and not index:
        raise UserError("--indices: needs the data (--data-root DIR) or a class index (--class-index FILE)")
    steps = []
    for step in p.steps:
        row: dict[str, Any] = {"step": step.index, "classes": {c: p.dataset.classes[c] for c in step.classes}}
        if "train" in index:
            chosen = p.train_images(step.index, index["train"].presence)
            row["train_images"] = len(chosen)
            if indices:
                row["train_indices"] = chosen
                row["train_names"] = [index["train"].names[i] for i in chosen]
        if "test" in index:
            row["test_images"] = len(p.test_images(step.index, index["test"].presence))
        steps.append(row)
    return {"name": p.name, "title": p.title, "data_set": p.dataset.name, "setting": p.setting, "order": p.order, "steps": steps}


def _indexes(dataset: Dataset, data_root: str | None, index_file: str | None) -> dict[str, ClassIndex]:
    if index_file:
        return {"train": read_class_index(Path(index_file), dataset)}
    if not data_root and not dataset.generator:
        try:
            locate(dataset)
        except UserError:
            return {}
    return class_indexes(dataset, data_root)


def protocol_text(data: Mapping[str, Any]) -> str:
    rows = []
    for step in data["steps"]:
        names = ", ".join(f"{c} {name}" for c, name in step["classes"].items())
        rows.append([step["step"], len(step["classes"]), step.get("train_images", "?"), step.get("test_images", "?"), names])
    head = f"{data['name']} ({data['title']}): data set {data['data_set']}, {data['setting']}, {len(data['steps'])} steps"
    table = tabulate(
        rows,
        headers=["step", "classes", "train images", "test images", "learned (background 0 is always there)"],
        tablefmt="plain",
        maxcolwidths=[None, None, None, None, 90],
    )
    lists = [f"step {step['step']}: " + " ".join(map(str, step["train_indices"])) for step in data["steps"] if "train_indices" in step]
    hint = [] if "train_images" in data["steps"][0] else ["image counts: say where the data is with --data-root DIR, or give --class-index FILE"]
    return "\n".join([head, table, *hint, *lists])


# ---- show method ---------------------------------------------------------------------------------------------------------


def method_data(name: str, protocol: str, track: str | None, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """A method with its resolved recipe: every value and where it comes from."""
    from bench.plan import footnotes_of

    spec, p = method(name), protocols.load(protocol)
    used = track or p.dataset.track
    recipe = resolve(spec, p, used, overrides_for(spec, parse_overrides(overrides), [spec]))
    own = spec.own_settings()
    settings = [
        {
            "name": key,
            "value": getattr(recipe.config, key),
            "source": recipe.sources[key],
            "what": " ".join((info.description or "").split()),
            "of": "method" if key in own else "training",
        }
        for key, info in spec.config.model_fields.items()
    ]
    settings.sort(key=lambda row: row["of"] != "method")
    return {
        "name": spec.name,
        "title": spec.title,
        "paper": spec.cls.paper,
        "what": " ".join((spec.cls.__doc__ or "").split()),
        "file": spec.cls.__module__,
        "version": spec.version,
        "first_step": spec.first_step,
        "protocol": p.name,
        "track": used,
        "notes": footnotes_of(spec, recipe),
        "settings": settings,
    }


def method_text(data: Mapping[str, Any]) -> str:
    lines = [f"{data['title']} ({data['name']}): {data['what']}"]
    if data["paper"]:
        lines.append(f"paper: {data['paper']}")
    own = data["first_step"] == data["name"]
    lines.append(f"step 0: {'its own' if own else 'that of ' + data['first_step']}")
    lines += [f"note: {note}" for note in data["notes"]]
    lines.append(f"recipe on {data['protocol']}, track {data['track']}:")
    rows = [[s["name"], _short(s["value"]), s["source"], s["what"]] for s in data["settings"]]
    return "\n".join(
        [
            *lines,
            tabulate(
                rows, headers=["setting", "value", "from", "what"], tablefmt="plain", disable_numparse=True, maxcolwidths=[None, None, None, 80]
            ),
        ]
    )


def _short(value: Any) -> str:
    return "-" if value is None else '""' if value == "" else str(value)


# ---- plan ----------------------------------------------------------------------------------------------------------------


def plan_data(plan: Plan, store: Store) -> dict[str, Any]:
    """The jobs of a plan, and the chains that use them."""
    known = store.keys()
    jobs = [
        {
            "key": job.key,
            "parent": job.parent,
            "method": job.method,
            "data_set": job.protocol.dataset.name,
            "step": job.step,
            "seed": job.inputs["seed"],
            "images": job.images,
            "iterations": job.iterations,
            "state": store.state(job.key).state if job.key in known else "waiting",
            "used_by": [chain.place(job.step) for chain in plan.users(job.key)],
            "inputs": job.inputs,
        }
        for job in plan.jobs.values()
    ]
    chains = [{"protocol": c.protocol.label, "track": c.track, "method": c.method, "seed": c.seed, "jobs": c.keys} for c in plan.chains]
    return {"jobs": jobs, "chains": chains}


def plan_text(plan: Plan, store: Store, force: bool = False) -> str:
    """One row a job; jobs that differ in their seed alone share a row."""
    known = store.keys()
    states = {key: store.state(key).state if key in known else "waiting" for key in plan.jobs}
    if force:
        states = {key: f"{state}, again" if state == "done" else state for key, state in states.items()}
    alike: dict[tuple[Any, ...], list[str]] = {}
    for key, job in plan.jobs.items():
        users = plan.users(key)
        who, what = (tuple(sorted(set(names))) for names in ([c.method for c in users], [c.protocol.label for c in users]))
        alike.setdefault((what, users[0].track, job.method, job.step, job.images, job.iterations, who), []).append(key)
    rows = []
    for (what, track, trained_by, step, images, iterations, who), keys in alike.items():
        shared = [", ".join(names) for names in (who, what) if len(names) > 1]
        seeds = ",".join(str(plan.jobs[key].inputs["seed"]) for key in keys)
        rows.append(
            [
                keys[0] if len(keys) == 1 else f"{len(keys)} jobs",
                what[0] + (" …" if len(what) > 1 else ""),
                track,
                trained_by,
                step,
                seeds,
                images,
                iterations,
                " ".join(_runs_of_words([states[key] for key in keys])),
                f"shared by {' in '.join(shared)}" if shared else "",
            ]
        )
    open_jobs = [job for key, job in plan.jobs.items() if force or states[key] != "done"]
    steps = sum(len(chain.keys) for chain in plan.chains)
    summary = (
        f"{len(plan.jobs)} jobs for {steps} steps of {len(plan.chains)} chains; {len(plan.jobs) - len(open_jobs)} done, {len(open_jobs)} to train, "
        f"{sum(job.iterations for job in open_jobs)} iterations"
    )
    headers = ["job", "protocol", "track", "method", "step", "seed", "images", "iterations", "state", ""]
    warnings = [f"WARNING: {warning}" for warning in plan.warnings]
    return "\n".join([tabulate(rows, headers=headers, tablefmt="plain", disable_numparse=True), *warnings, summary])


def _runs_of_words(words: Sequence[str]) -> list[str]:
    """["done", "done", "waiting"] as ["2 done", "1 waiting"]; a single word stands alone."""
    if len(words) == 1:
        return list(words)
    return [f"{words.count(word)} {word}" for word in dict.fromkeys(words)]
