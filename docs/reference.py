"""The pages of the reference that are made from the code while the site is built (a hook of mkdocs.yml).

`PAGES` are functions without arguments that return Markdown; mkdocs is needed only to put them into the site.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args, get_origin

from bench import cli
from bench.data.dataset import DATASETS
from bench.errors import UserError
from bench.method.interface import Method
from bench.method.recipe import PUBLISHED, TRACKS, Recipe
from bench.method.registry import METHODS, MethodSpec, method
from bench.method.resolve import published_on, resolve
from bench.method.settings import FIRST, TRAINING, Settings
from bench.models.build import CLASSIFIERS
from bench.protocol.file import PROTOCOLS, load
from bench.protocol.protocol import Protocol

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = ROOT / "tests/golden/data"
SHIPPED = "methods"
"""The package whose methods the page lists, whatever else is installed."""
EXAMPLES = ("voc-15-1", "ade-100-5", "camvid-6-1", "shapes-6-2")
"""Protocols whose recipes the page shows."""


# ---- Markdown ----------------------------------------------------------------------------------------------


def cell(value: object) -> str:
    """A value in a cell of a table."""
    text = " ".join(str(value).split())
    return re.sub(r"([|*<_])", r"\\\1", text) if "`" not in text else text.replace("|", r"\|")


def code(value: object) -> str:
    """A word as it is typed."""
    return f"`{value}`".replace("|", r"\|")


def table(headers: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [headers, ["---"] * len(headers), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def words(values: Iterable[str]) -> str:
    """Values in code, with commas."""
    return ", ".join(map(code, values))


# ---- methods -----------------------------------------------------------------------------------------------


def shipped_methods() -> list[str]:
    """Names of the methods of this repository."""
    found, _ = METHODS.everything()
    return sorted(name for name, one in found.items() if one.cls.__module__.partition(".")[0] == SHIPPED)


def spec_of(name: str) -> MethodSpec:
    """A method as one runs it: a wrapper around MiB, or around the first method that it can wrap."""
    if not METHODS.find(name).cls.wraps:
        return method(name)
    return method(min(METHODS.candidates(f"{name}+*"), key=lambda found: found != f"{name}+mib"))


def spec_page(name: str) -> str:
    """Name of the page of docs/spec that a method's file names most, or whose line in the index has the
    method's title; "" if there is none."""
    cls = METHODS.find(name).cls
    path = ROOT / cls.__module__.replace(".", "/")
    text = (path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text()
    named = Counter(re.findall(r"spec/([\w-]+)\.md", text))
    if named:
        return named.most_common(1)[0][0]
    index = (ROOT / "docs/spec/index.md").read_text()
    rows = re.findall(r"^\| \[([\w-]+)\]\([^)]*\) \| ([^|]*) \|", index, re.MULTILINE)
    return next((page for page, told in rows if cls.title in told.split(", ")), "")


def golden_cases(name: str) -> dict[str, int]:
    """How many cases recorded from the authors' code each family behind a method has.

    The families are the functions of the method's page of docs/spec, and the whole chains of the same name.
    """
    family = re.sub(r"-(family|star)$", "", spec_page(name)) or name
    counts = {}
    for wanted in dict.fromkeys((family, f"chain-{family}", f"chain-{name}")):
        manifest = GOLDEN / wanted / "manifest.json"
        if manifest.is_file():
            counts[wanted] = len(json.loads(manifest.read_text()))
    return counts


def example_protocols() -> list[Protocol]:
    """One protocol of each data set, the first by name where none is named above."""
    by_set = {load(name).dataset.name: load(name) for name in EXAMPLES}
    for name in PROTOCOLS.known():
        by_set.setdefault(load(name).dataset.name, load(name))
    return list(by_set.values())


def recipes_of(spec: MethodSpec) -> list[list[str]]:
    """Rows of a table: what each track's recipe says on each data set, where there is one."""
    rows = []
    for track in TRACKS.known():
        for protocol in example_protocols():
            if track != PUBLISHED and protocol.dataset.track not in (track, PUBLISHED):
                continue
            try:
                config = resolve(spec, protocol, track).config
            except UserError:
                continue
            first, later = config.at(0), config.at(1)
            rows.append(
                [
                    track,
                    code(protocol.name),
                    code(later.network),
                    *(
                        first_and_later(getattr(first, key), getattr(later, key))
                        for key in ("epochs", "lr", "batch_size")
                    ),
                    str(later.crop),
                    code(later.label_rule),
                ]
            )
    return rows


def first_and_later(first: object, later: object) -> str:
    """A setting's value at step 0 and at later steps, said once if they are equal."""
    return str(first) if first == later else f"{first}, then {later}"


def first_recipe(spec: MethodSpec) -> Settings:
    """The published values, or those of the first track and protocol that has any."""
    for track in dict.fromkeys((PUBLISHED, *TRACKS.known())):
        for protocol in example_protocols():
            try:
                return resolve(spec, protocol, track).config
            except UserError:
                continue
    raise UserError(f"{spec.name}: no track has a recipe for it")


def needs_of(spec: MethodSpec) -> list[str]:
    """What a method needs beside images and labels, in words."""
    cls, own = spec.cls, spec.own
    config = first_recipe(spec)
    needs = []
    if own.wraps:
        needs.append(f"a method to stand around, with a classifier of the kind {words(own.wraps)}")
    if maps := cls.maps(config):
        needs.append(f"a map beside each training image: {words(maps)}")
    if (size := dict(config).get("memory_size")) is not None:
        needs.append(
            f"a memory of {size} images" if size else "no memory, unless `memory_size` or a variant says so"
        )
    if cls.needs_teacher:
        needs.append("the previous step's network beside the one in training")
    if cls.knows_later:
        needs.append("to know which classes later steps add")
    for name in cls.records(config):
        needs.append(f"a record made while step 0 trains: {code(name)}")
    says = f": {CLASSIFIERS.find(cls.classifier).says}" if cls.classifier in CLASSIFIERS else ""
    needs.append(f"a network that carries the classifier {code(cls.classifier)}{says}")
    return needs


def first_step_of(own: type[Method]) -> str:
    """Whose step 0 a method builds on, in words."""
    if own.first_step:
        return f"that of {code(own.first_step)}, shared with it"
    return "that of the method it stands around" if own.wraps else "its own"


def ran_by_authors(recipe: Recipe) -> str:
    """Protocols on which a method's authors ran the published recipe; of a wrapper, around which method."""
    tables = {"": recipe.table(PUBLISHED)}
    tables |= {name: kinds[PUBLISHED] for name, kinds in recipe.around.items() if PUBLISHED in kinds}
    said = [
        f"{f'around {code(name)}: ' if name else ''}{words(scoped.ran)}"
        for name, scoped in tables.items()
        if scoped.ran
    ]
    return "; ".join(said)


def method_section(name: str) -> str:
    """All of one method."""
    spec = spec_of(name)
    own, config = spec.own, spec.config
    recipe = spec.recipes[-1]
    title = own.title or name
    typed = f"{name}+METHOD" if own.wraps else name
    page = spec_page(name)
    lines = [f"## {title} {{ #{name} }}", "", " ".join((own.__doc__ or "").split()), ""]
    about = [
        ["name", code(typed)],
        ["paper", cell(own.paper or "-")],
        ["specification", f"[{page}](../spec/{page}.md)" if page else "-"],
        ["file", code(own.__module__)],
        ["step 0", first_step_of(own)],
        ["needs", "; ".join(needs_of(spec))],
        [
            "recorded cases behind it",
            ", ".join(f"{n} of {code(f)}" for f, n in golden_cases(name).items()) or "-",
        ],
    ]
    if own.wraps:
        bases = [one.partition("+")[2] for one in METHODS.candidates(f"{name}+*")]
        about.insert(1, ["around", words(bases)])
    if ran := ran_by_authors(recipe):
        about.append(["its authors ran", ran])
    lines += [table(["", ""], about), ""]
    if own.caveats:
        lines += ["Footnotes of every table:", "", *(f"- {caveat}" for caveat in own.caveats), ""]
    mine = [key for key in own.Config.model_fields if key not in TRAINING]
    if mine:
        lines += ["Its own settings:", "", settings_table(config, mine), ""]
    if recipe.variants:
        rows = [
            [code(f"{name}@{variant}"), changes_of(recipe.variants[variant])] for variant in recipe.variants
        ]
        lines += ["Variants:", "", table(["name", "what it sets"], rows), ""]
    shown = f" (as {code(spec.name)})" if own.wraps else ""
    headers = ["track", "on", "network", "epochs", "learning rate", "batch", "crop", "label rule"]
    lines += [f"Recipes{shown}:", "", table(headers, recipes_of(spec)), ""]
    return "\n".join(lines)


def changes_of(tables: Mapping[str, Any]) -> str:
    """What a variant sets, by table."""
    said = []
    for track, scoped in tables.items():
        where = f"{track}: " if track else ""
        values = [f"{key} = {value}" for key, value in scoped.values.items()]
        for scope, inner in scoped.scopes.items():
            values += [f"{key} = {value} on {scope}" for key, value in inner.items()]
        if scoped.like:
            values.insert(0, f"training settings of {scoped.like}")
        if values:
            said.append(cell(where + ", ".join(values)))
    return "; ".join(said) or "-"


def methods_page() -> str:
    """Every method of this repository."""
    names = shipped_methods()
    rows = []
    for name in names:
        spec = spec_of(name)
        sets = [
            scope for scope in published_on(method(name) if not spec.own.wraps else spec) if scope in DATASETS
        ]
        rows.append(
            [
                f"[{cell(spec.own.title or name)}](#{name})",
                code(f"{name}+METHOD" if spec.own.wraps else name),
                words(sets) or "-",
                words(f"@{variant}" for variant in spec.recipes[-1].variants) or "-",
                str(sum(golden_cases(name).values()) or "-"),
            ]
        )
    headers = ["method", "name", "published recipes", "variants", "recorded cases"]
    return "\n".join(
        [
            "# Methods",
            "",
            "Made from the code when this site is built. `bench list methods` prints the names with those of",
            "other packages; `bench show method NAME --protocol NAME` prints every value of a recipe with",
            "its source. *Recorded cases* are inputs and outputs recorded from the authors' code",
            "(`tests/golden/data`): those of the family that the method's specification names, and of whole",
            "chains. Methods of one family share them.",
            "",
            table(headers, rows),
            "",
            *map(method_section, names),
        ]
    )


# ---- settings ----------------------------------------------------------------------------------------------


def type_words(annotation: Any) -> str:
    """A type as a user thinks of it."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if str(origin).endswith("Literal"):
        return " or ".join(json.dumps(one) for one in inner)
    if inner:
        return " or ".join("none" if one is type(None) else type_words(one) for one in inner)
    return {"str": "text", "int": "whole number", "float": "number", "bool": "true or false"}.get(
        getattr(annotation, "__name__", ""), getattr(annotation, "__name__", str(annotation))
    )


def bounds(metadata: Iterable[Any]) -> str:
    signs = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
    found = [
        f"{sign} {getattr(mark, name)}"
        for mark in metadata
        for name, sign in signs.items()
        if hasattr(mark, name)
    ]
    return ", ".join(found)


def in_key(config: type[Settings], name: str) -> str:
    """What a setting decides, in words: the keys of which steps hold it."""
    if name.startswith(FIRST):
        return "step 0"
    if config.is_free(name):
        return "never"
    marks = [str(mark) for mark in config.model_fields[name].metadata]
    if any("later" in mark for mark in marks):
        return "later steps"
    if any("first" in mark for mark in marks):
        return "step 0"
    neutral = next(
        (mark for mark in config.model_fields[name].metadata if type(mark).__name__ == "Neutral"), None
    )
    return "all steps" if neutral is None else f"all steps, unless {json.dumps(neutral.value)}"


def settings_table(config: type[Settings], names: Iterable[str]) -> str:
    rows = []
    for name in names:
        info = config.model_fields[name]
        limits = bounds(info.metadata)
        default = "none" if info.default is None else json.dumps(info.default)
        rows.append(
            [
                code(name),
                code(default),
                cell(type_words(info.annotation) + (f", {limits}" if limits else "")),
                in_key(config, name),
                cell(info.description or "-"),
            ]
        )
    return table(["setting", "default", "type", "in the key of", "what"], rows)


def settings_page() -> str:
    """The settings that every method has."""
    return "\n".join(
        [
            "# Settings",
            "",
            "The settings that every method has. A recipe or a track gives them other values than these",
            "defaults (`bench show method NAME --protocol NAME` says which, and where from); `--set",
            "KEY=VALUE` wins over all of them. A setting `first_x` stands in the place of `x` at step 0;",
            "where it is none, step 0 has `x`. *In the key of*: the steps whose content key holds the",
            "setting, so that another value is another job. A method's own settings stand with the",
            "[methods](methods.md).",
            "",
            settings_table(Settings, Settings.model_fields),
            "",
            "## Tracks",
            "",
            table(
                ["track", "what"],
                [[code(name), cell(TRACKS.find(name).says)] for name in TRACKS.known()],
            ),
            "",
        ]
    )


# ---- commands ----------------------------------------------------------------------------------------------


def options_table(group: argparse._ArgumentGroup) -> str:
    rows = []
    for action in group._group_actions:
        if isinstance(action, argparse._SubParsersAction) or "--help" in action.option_strings:
            continue
        value = action.metavar or ("" if action.nargs == 0 else action.dest.upper())
        shown = ", ".join(f"{option} {value}".strip() for option in action.option_strings)
        rows.append([code(shown or value or action.dest), cell(action.help or "-")])
    return table(["", ""], rows) if rows else ""


def command_section(parser: argparse.ArgumentParser, level: int = 2, what: str = "") -> str:
    """Usage, options and examples of one command."""
    usage = " ".join(parser.format_usage().removeprefix("usage: ").split())
    lines = [f"{'#' * level} {parser.prog}", "", parser.description or what, "", "```text", usage, "```", ""]
    deeper: list[str] = []
    for group in parser._action_groups:
        if shown := options_table(group):
            named = group.title not in ("positional arguments", "options")
            lines += [*([f"{group.title}:".capitalize(), ""] if named else []), shown, ""]
        for action in group._group_actions:
            if isinstance(action, argparse._SubParsersAction):
                said = {choice.dest: choice.help or "" for choice in action._choices_actions}
                deeper += [
                    command_section(sub, level + 1, said[name]) for name, sub in action.choices.items()
                ]
    if parser.epilog:
        examples = [line.strip() for line in parser.epilog.splitlines()[1:]]
        lines += ["```sh", *examples, "```", ""]
    return "\n".join([*lines, *deeper])


def commands_page() -> str:
    """Every command with its options."""
    return "\n".join(
        [
            "# Commands",
            "",
            "Made from the parsers of the commands; `bench COMMAND --help` prints the same.",
            "Exit status: 0; 1 if jobs failed, or if `bench doctor` finds what would make runs fail; 2 for",
            "what a user can mend; 130 if interrupted.",
            "",
            table(
                ["command", "what"],
                [[f"[{name}](#bench-{name})", cell(what)] for name, what in cli.COMMANDS.items()],
            ),
            "",
            *(command_section(cli.parser(name)) for name in cli.COMMANDS),
        ]
    )


PAGES: Mapping[str, Callable[[], str]] = {
    "reference/methods.md": methods_page,
    "reference/commands.md": commands_page,
    "reference/settings.md": settings_page,
}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Called by mkdocs when it knows the files of the folder."""
    from mkdocs.structure.files import File

    for path, make in PAGES.items():
        files.append(File.generated(config, path, content=make()))
    return files
