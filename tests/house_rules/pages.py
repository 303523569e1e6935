"""The house rules about all else that is shipped: files, recipes, pages, and the command line.

As in `rules`, a function takes the repository's root and returns the violations it finds.
"""

import importlib
import json
import math
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperGroup
from typer.main import get_command

from attending.config import Config
from attending.errors import ConfigError
from tests.house_rules.rules import ROOMS, sources

FILE_BYTES, DRAFT_BYTES = 1_500_000, 24 * 2**20
DRAFTS = "attending/engine/drafts"
# Written so that the patterns do not find themselves.
MACHINE = re.compile(
    r"(?<![\w.~})-])/(?:home|root|work|Users)/"
    r"|\b(?:pypi|files[.]pythonhosted|download[.]pytorch)[.]org"
)
FENCE = re.compile(r"^ *```(\w*).*?\n(.*?)^ *```", re.MULTILINE | re.DOTALL)
SHELLS = {"", "sh", "bash", "shell", "console"}
HELP = """
import json, sys
from typer.core import TyperGroup
from typer.main import get_command
from typer.testing import CliRunner
seen, told = set(), []
def ask(command, words):
    from attending.cli import app
    done = CliRunner().invoke(app, [*words, "--help"])
    told.append([" ".join(["attending", *words]), done.exit_code, sorted(set(sys.modules) - seen)])
    seen.update(sys.modules)
    command = command or get_command(app)
    for name, below in command.commands.items() if isinstance(command, TyperGroup) else ():
        ask(below, [*words, name])
ask(None, [])
print(json.dumps(told))
"""


def tracked(root: Path) -> list[Path]:
    """What git holds or would add."""
    git = ["git", "-C", str(root), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(git, capture_output=True, text=True, check=True).stdout.split("\0")
    return sorted(root / name for name in set(names) if (root / name).is_file())


def large_files(root: Path) -> list[str]:
    """A repository is for text; weights and data are pulled, but for a draft's of 24 MiB."""
    weights = {*(root / DRAFTS).glob("*/model.safetensors")}
    limits = {path: DRAFT_BYTES if path in weights else FILE_BYTES for path in tracked(root)}
    return [
        f"{path.relative_to(root)}: {path.stat().st_size:,} bytes, at most {most:,}"
        for path, most in limits.items()
        if path.stat().st_size > most
    ]


def machine_traces(root: Path) -> list[str]:
    """No text names one machine's folders or a package registry's host."""
    found = []
    for path in tracked(root):
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError:
            continue  # not a text
        for number, line in enumerate(lines, 1):
            hits = (hit.group() for hit in MACHINE.finditer(line))
            found += [f"{path.relative_to(root)}:{number} names {hit}" for hit in hits]
    return found


def unbuilt_recipes(root: Path, config_of: Callable[[Path, str], type[Config]]) -> list[str]:
    """Every recipes/VERB/NAME.toml builds its verb's Config; nothing else lies there."""
    found = []
    recipes = root / "attending" / "recipes"
    for path in sorted(path for path in recipes.rglob("*") if path.is_file()):
        place = path.relative_to(recipes)
        if len(place.parts) != 2 or path.suffix != ".toml":
            found.append(f"recipes/{place}: expected recipes/VERB/NAME.toml")
            continue
        try:
            config_of(root, place.parts[0]).load(str(path), place.parts[0])
        except (ConfigError, LookupError) as error:
            found.append(f"recipes/{place}: {error}")
    return found


def config_of(root: Path, verb: str) -> type[Config]:
    """The class VerbConfig, in any case, wherever in the package it stands.

    Raises:
        LookupError: There is none, or more than one.
    """
    pattern = re.compile(rf"^class ({verb}config)\b", re.IGNORECASE | re.MULTILINE)
    found = [(s.path, name) for s in sources(root) for name in pattern.findall(s.text)]
    if len(found) != 1:
        raise LookupError(f"expected one class {verb.capitalize()}Config, found {found or 'none'}")
    module = importlib.import_module(found[0][0].removesuffix(".py").replace("/", "."))
    config: type[Config] = vars(module)[found[0][1]]
    return config


def unknown_commands(root: Path, app: typer.Typer) -> list[str]:
    """Every `attending` and `make` in the pages' shell blocks is one that exists."""
    makefile = root / "Makefile"
    text = makefile.read_text(encoding="utf-8") if makefile.is_file() else ""
    rules = re.findall(r"^([^\s#:=][^:=\n]*):(?!=)", text, re.MULTILINE)
    targets = {target for rule in rules for target in rule.split()} - {".PHONY"}
    found, verbs = [], 0
    for page in [root / "README.md", *sorted((root / "docs").glob("**/*.md"))]:
        for words in shell_commands(page.read_text(encoding="utf-8") if page.is_file() else ""):
            tool, rest = words[0].rpartition("/")[2], words[1:]
            complaint = ""
            if tool == "make":
                wrong = [
                    word for word in rest if not re.search("^-|=", word) and word not in targets
                ]
                complaint = f"no target {wrong[0]}" if wrong else ""
            elif tool in ("python", "torchrun") and "attending" in rest:  # -m attending VERB
                complaint = _complaint(get_command(app), rest[rest.index("attending") + 1 :])
            elif tool == "attending":
                verbs += 1
                complaint = _complaint(get_command(app), rest)
            if complaint:
                found.append(f"{page.relative_to(root)}: `{shlex.join(words)}`: {complaint}")
    return found if verbs else [*found, "README.md and docs/ show no attending command"]


def shell_commands(page: str) -> Iterator[list[str]]:
    """The simple commands of a page's shell blocks; a console's output is none."""
    for language, body in FENCE.findall(page):
        for line in re.sub(r"\\\n\s*", " ", body).splitlines() if language in SHELLS else []:
            if language == "console" and not line.startswith("$ "):
                continue
            lexer = shlex.shlex(line.strip().removeprefix("$ "), posix=True, punctuation_chars=True)
            lexer.whitespace_split = True
            words: list[str] = []
            try:
                parts = list(lexer)
            except ValueError:  # a quotation that goes on in the next line
                parts = line.split()
            for part in [*parts, ";"]:
                if set(part) <= set("();<>|&"):
                    if words:
                        yield words
                    words = []
                elif words or not re.match(r"\w+=", part):  # A=b before a command
                    words.append(part)


def undrawn_tree(root: Path) -> list[str]:
    """README's block that begins with `attending/` names all modules and folders that exist.

    A line is names, one space between them, then two spaces and the description; `a b (.py)` is
    short for a.py b.py.
    """
    readme = root / "README.md"
    page = readme.read_text(encoding="utf-8") if readme.is_file() else ""
    blocks = [body for _, body in FENCE.findall(page) if re.match(r"\s*attending/\s*\n", body)]
    if len(blocks) != 1:
        return [f"README.md: {len(blocks)} fenced blocks begin with attending/; expected one"]
    drawn: set[str] = set()
    first = 0
    for line in blocks[0].splitlines()[1:]:
        rest = line.lstrip(" │├└─")
        depth = len(line) - len(rest)
        first = first or depth
        if rest and depth == 0:
            break  # the package's neighbours
        if depth == first:
            names = re.split(r"\s{2,}|\s#", rest)[0].split()
            drawn |= {f"{name}.py" for name in names[:-1]} if "(.py)" in names else {*names}
    places = [path.relative_to(root).parts for path in tracked(root)]
    inside = [parts[1:] for parts in places if parts[0] == "attending"]
    there = {parts[0] + "/" * (len(parts) > 1) for parts in inside}
    wanted = {name for name in there if name.endswith(("/", ".py"))} - {"__init__.py"}
    return [f"README.md's tree lacks {name}" for name in sorted(wanted - drawn)] + [
        f"README.md's tree has {name}, which does not exist" for name in sorted(drawn - there)
    ]


def heavy_help(root: Path) -> list[str]:
    """`attending --help`, and that of every verb, imports no room and no torch."""
    command = [sys.executable, "-c", HELP]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    if done.returncode:
        return [f"attending --help: {(done.stderr.strip() or 'no output').splitlines()[-1]}"]
    found = []
    for words, code, modules in json.loads(done.stdout.splitlines()[-1]):
        rooms = {f"attending.{room}" for room in ROOMS}
        heavy = [name for name in modules if name == "torch" or name in rooms]
        found += [f"{words} --help imports {', '.join(heavy)}"] if heavy else []
        found += [f"{words} --help: exit code {code}"] if code else []
    return found


def _complaint(command: Any, words: Sequence[str]) -> str:
    """What the command line would refuse in these words; nothing is run."""
    takes_value = {"--help": False, "-h": False}
    arguments = [param for param in command.params if param.param_type_name == "argument"]
    for param in command.params:
        if param.param_type_name == "option":
            names = [*param.opts, *param.secondary_opts]
            takes_value |= dict.fromkeys(names, not (param.is_flag or param.count))
    rest, given = iter(words), 0
    for word in rest:
        option, equals, _ = word.partition("=")
        if word.startswith("-") and word != "-":
            if option not in takes_value:
                return f"no option {option}"
            if takes_value[option] and not equals and next(rest, None) is None:
                return f"{option} without a value"
        elif isinstance(command, TyperGroup):
            verb = command.commands.get(word)
            return _complaint(verb, list(rest)) if verb else f"no verb {word}"
        else:
            given += 1
    least = sum(param.required for param in arguments)
    most = math.inf if any(param.nargs == -1 for param in arguments) else len(arguments)
    wrong = not least <= given <= most and "--help" not in words
    return f"{given} arguments, takes {least} to {most}" if wrong else ""
