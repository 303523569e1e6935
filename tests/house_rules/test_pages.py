"""What is shipped beside the code obeys its rules, and each rule bites on a tree that breaks it."""

import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import typer

from attending.cli import app
from attending.config import Config
from tests.house_rules import pages

ROOT = Path(__file__).parents[2]
HOST = "pypi" + ".org"  # in two parts, for this file is searched too

TREE = """
```
attending/
├── config errors (.py)  what all share
├── phi/                 identifiers; model.py and x/ are words here
│   └── deep/            a room's own folders may be drawn
├── sources.py chat.py  # nouns
└── cli.py  # the verbs
tests/
  more/
```
"""

toy = typer.Typer(context_settings={"help_option_names": ["-h", "--help"]})
phi = typer.Typer()
toy.add_typer(phi, name="phi")


@toy.callback()
def _options(debug: bool = False) -> None:
    """Options of every verb."""


@toy.command()
def train(recipe: str, out: str = "", resume: bool = False, name: list[str] | None = None) -> None:
    """One argument."""


@toy.command()
def ask(words: list[str]) -> None:
    """One argument or more."""


@phi.command()
def scan(file: str, limit: int = 3) -> None:
    """A verb below a verb."""


@phi.command()
def clean(file: str = "") -> None:
    """Without it, `scan` would be the group itself."""


class ToyConfig(Config):
    """Of the recipes below."""

    steps: int
    """More is longer."""


def plant(root: Path, files: Mapping[str, str | bytes]) -> Path:
    """Write a small repository; nothing is committed."""
    tree = root / "tree"
    for name, content in files.items():
        path = tree / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    subprocess.run(["git", "init", "-q", str(tree)], check=True)
    return tree


def shell(*lines: str, language: str = "sh") -> str:
    return "\n".join(["# A page", f"```{language}", *lines, "```", "attending nothing", ""])


@pytest.mark.parametrize(
    "rule",
    [pages.large_files, pages.machine_traces, pages.undrawn_tree, pages.heavy_help],
    ids=lambda rule: rule.__name__,
)
def test_the_house_obeys(rule: Callable[[Path], list[str]]) -> None:
    found = rule(ROOT)
    assert not found, "\n".join(found)


def test_every_shipped_recipe_builds() -> None:
    found = pages.unbuilt_recipes(ROOT, pages.config_of)
    assert not found, "\n".join(found)


def test_every_command_in_the_pages_exists() -> None:
    found = pages.unknown_commands(ROOT, app)
    assert not found, "\n".join(found)


def test_a_large_file_is_found_unless_git_ignores_it(tmp_path: Path) -> None:
    big, larger, drafts = bytes(1_500_001), bytes(24 * 2**20 + 1), "attending/engine/drafts"
    files = {"a.bin": big, "b.bin": big[1:], "c.bin": big, ".gitignore": b"c.bin\n"}
    weights = [f"{drafts}/{name}/model.safetensors" for name in "ab"]
    files |= {weights[0]: larger, weights[1]: larger[1:], f"{drafts}/a/report.html": big}
    assert pages.large_files(plant(tmp_path, files)) == [
        "a.bin: 1,500,001 bytes, at most 1,500,000",
        f"{weights[0]}: 25,165,825 bytes, at most 25,165,824",
        f"{drafts}/a/report.html: 1,500,001 bytes, at most 1,500,000",
    ]


SIGNS = ("~", "$HOME", "{root}", "my")  # before a slash, they make it no machine's path


@pytest.mark.parametrize(
    "text",
    [
        "see /" + "home/me/model",
        'open("/' + 'root/.cache")',
        "(/" + "work/data)",
        "file:///" + "Users/me",
        f"https://{HOST}/simple",
        "https://files." + "pythonhosted.org/x",
        "--index-url https://download." + "pytorch.org/whl",
    ],
)
def test_a_trace_of_a_machine_or_registry_is_found(tmp_path: Path, text: str) -> None:
    found = pages.machine_traces(plant(tmp_path, {"docs/a.md": f"one\n{text}\n"}))
    assert len(found) == 1
    assert found[0].startswith("docs/a.md:2 names ")


def test_links_home_signs_and_binaries_are_no_traces(tmp_path: Path) -> None:
    files: dict[str, str | bytes] = {
        "a.md": " ".join(f"{before}/" + "home/x" for before in ("https://hub.example", *SIGNS)),
        "a.bin": b"\xff\xfe/" + b"home/me",
    }
    assert pages.machine_traces(plant(tmp_path, files)) == []


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("toy/a.toml", "steps = 'many'", "steps: Input should be a valid integer"),
        ("toy/a.toml", "stepz = 1", "Did you mean 'steps'"),
        ("toy/a.toml", "steps =", "not valid TOML"),
        ("toy/a.toml", "base = 'nothing'", "no toy recipe 'nothing'"),
        ("other/a.toml", "steps = 1", "no config for other"),
        ("a.toml", "steps = 1", "expected recipes/VERB/NAME.toml"),
        ("toy/a.json", "{}", "expected recipes/VERB/NAME.toml"),
        ("toy/deep/a.toml", "steps = 1", "expected recipes/VERB/NAME.toml"),
    ],
)
def test_a_recipe_that_does_not_build_is_found(
    tmp_path: Path, name: str, text: str, told: str
) -> None:
    def config_of(root: Path, verb: str) -> type[Config]:
        if verb != "toy":
            raise LookupError(f"no config for {verb}")
        return ToyConfig

    files = {
        "attending/recipes/toy/good.toml": "steps = 3",
        f"attending/recipes/{name}": text,
    }
    found = pages.unbuilt_recipes(plant(tmp_path, files), config_of)
    assert len(found) == 1
    assert found[0].startswith(f"recipes/{name}: ")
    assert told in found[0]


def test_a_verbs_config_is_found_by_its_name(tmp_path: Path) -> None:
    assert pages.config_of(ROOT, "").__name__ == "Config"
    root = plant(tmp_path, {"attending/rl/a.py": "class RLConfig(Config): ...\n"})
    with pytest.raises(LookupError, match="one class SftConfig, found none"):
        pages.config_of(root, "sft")
    plant(tmp_path, {"attending/rl/b.py": "class RlConfig(Config): ...\n"})
    with pytest.raises(LookupError, match=r"one class RlConfig, found .*a\.py.*b\.py"):
        pages.config_of(root, "rl")


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("attending fly", "no verb fly"),
        ("attending phi fly", "no verb fly"),
        ("attending train", "0 arguments, takes 1 to 1"),
        ("attending train a b", "2 arguments, takes 1 to 1"),
        ("attending ask", "0 arguments, takes 1 to inf"),
        ("attending train a --outt b", "no option --outt"),
        ("attending train a --out", "--out without a value"),
        ("attending train a --debug", "no option --debug"),
        ("attending --out b train a", "no option --out"),
        ("$ FOO=1 attending fly", "no verb fly"),
        ("cd x && .venv/bin/attending fly | head", "no verb fly"),
        ("model=$(attending fly)", "no verb fly"),
        ("torchrun --nproc-per-node 2 -m attending train a --outt b", "no option --outt"),
        ("make fly", "no target fly"),
        ("python -m attending fly", "no verb fly"),
        ("make test fly", "no target fly"),
        ("make .PHONY", "no target .PHONY"),
        ("make PYTHON", "no target PYTHON"),
    ],
)
def test_a_command_that_does_not_exist_is_found(tmp_path: Path, line: str, told: str) -> None:
    files = {
        "Makefile": "PYTHON := python3\n.PHONY: test ask\ntest: check\n\ta\nask check:\n\tfly: b\n",
        "README.md": shell("attending train a"),
        "docs/deep/a.md": shell(line),
    }
    found = pages.unknown_commands(plant(tmp_path, files), toy)
    assert len(found) == 1
    assert found[0].startswith("docs/deep/a.md: ")
    assert found[0].endswith(told)


def test_commands_that_exist_pass(tmp_path: Path) -> None:
    good = (
        "# attending fly",
        "attending --debug train hf:org/name@main --out=b --no-resume --name x --name y # as told",
        "attending ask 'why; attending fly?' - && attending phi scan x --limit 5 > out.json",
        "attending train --help",
        "attending train \\",
        "  a --resume",
        "make test -j2 Q='what is it?'; make check ask",
        "curl -d '{",
        '  "text": "the attending fly"',
    )
    page = shell(*good) + shell("attending fly", language="python")
    page += shell("$ attending phi clean", "attending fly is output", language="console")
    makefile = "test: check\nask check:\n"
    root = plant(tmp_path, {"README.md": page, "Makefile": makefile})
    assert pages.unknown_commands(root, toy) == []


def test_pages_without_any_command_are_found(tmp_path: Path) -> None:
    assert pages.unknown_commands(plant(tmp_path, {"README.md": TREE}), toy) == [
        "README.md and docs/ show no attending command"
    ]


@pytest.mark.parametrize("page", [TREE, TREE.translate({ord(c): " " for c in "├─│└"})])
def test_a_tree_that_drifted_is_found(tmp_path: Path, page: str) -> None:
    names = "config.py errors.py sources.py chat.py cli.py __init__.py phi/__init__.py card.jinja"
    files = dict.fromkeys((f"attending/{name}" for name in names.split()), "")
    root = plant(tmp_path, files | {"README.md": page})
    (root / "attending" / "empty").mkdir()  # as git, the tree knows files only
    assert pages.undrawn_tree(root) == []
    plant(tmp_path, {"attending/rl/a.py": "", "attending/new.py": ""})
    (root / "attending" / "errors.py").unlink()
    assert pages.undrawn_tree(root) == [
        "README.md's tree lacks new.py",
        "README.md's tree lacks rl/",
        "README.md's tree has errors.py, which does not exist",
    ]


def test_a_readme_without_the_tree_is_found(tmp_path: Path) -> None:
    assert len(pages.undrawn_tree(plant(tmp_path, {"README.md": "attending/"}))) == 1


CLI = """
import typer
app = typer.Typer()

@app.callback()
def options(): ...

@app.command()
def quick():
    import attending.engine

@app.command()
def slow(): ...
"""


@pytest.mark.parametrize(
    ("cli", "told"),
    [
        (CLI, []),
        ("import attending.engine\n" + CLI, ["attending --help imports attending.engine"]),
        ("from attending import a\n" + CLI, ["attending --help imports attending.engine, torch"]),
        ("import nothing_of_this_name\n" + CLI, ["No module named 'nothing_of_this_name'"]),
    ],
)
def test_a_heavy_help_is_found(tmp_path: Path, cli: str, told: list[str]) -> None:
    files = {
        "attending/__init__.py": "",
        "attending/a.py": "import attending.engine.x, torch",
        "attending/engine/__init__.py": "",
        "attending/engine/x.py": "",
        "torch.py": "",
        "attending/cli.py": cli,
    }
    found = pages.heavy_help(plant(tmp_path, files))
    assert len(found) == len(told)
    assert all(fragment in line for fragment, line in zip(told, found, strict=True))
