"""The house obeys its rules, and every rule bites: each is tried on a small tree that breaks it."""

import inspect
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.house_rules import rules
from tests.house_rules.rules import Source, imports, sources

ROOT = Path(__file__).parents[2]

Rule = Callable[[Path], list[str]]
RULES: list[Rule] = [
    rule
    for _, rule in inspect.getmembers(rules, inspect.isfunction)
    if inspect.signature(rule).return_annotation == list[str]
]


def plant(root: Path, files: dict[str, str]) -> Path:
    """Write files into the package of a small tree."""
    for name, text in files.items():
        path = root / "tree/attending" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return root / "tree"


def lines(count: int) -> str:
    return "x = 1\n" * count


def function(count: int, name: str = "f", *, indent: str = "") -> str:
    return f"{indent}def {name}():\n" + f"{indent}    x = 1\n" * (count - 1)


# rule, tree, and what the one violation says
BAD: list[tuple[Rule, dict[str, str], str]] = [
    (rules.file_sizes, {"rl/a.py": lines(501)}, "rl/a.py: 501 lines"),
    (rules.file_sizes, {"../tests/rl/test_a.py": lines(501)}, "test_a.py: 501"),
    (rules.function_sizes, {"a.py": function(81)}, "a.py:1 f: 81 lines > 80"),
    (rules.function_sizes, {"../tests/test_a.py": "async " + function(81)}, "f: 81"),
    (rules.function_sizes, {"a.py": "class A:\n" + function(81, indent="    ")}, "a.py:2 f: 81"),
    (rules.function_sizes, {"rl/loop.py": function(121)}, "f: 121 lines > 120"),
    (rules.function_sizes, {"rl/loop.py": function(9) + function(81, "g")}, "g: 81"),
    (rules.function_sizes, {"rl/loop.py": function(81, "_g") + function(9)}, "_g: 81"),
    (rules.function_sizes, {"rl/hoop.py": function(81)}, "f: 81 lines > 80"),
    (rules.budgets, {"a.py": lines(1400), "b.py": lines(1131)}, "hallway: 2531"),
    (rules.budgets, {"tokenizer/bpe/a.py": lines(251)}, "tokenizer: 251 lines"),
    (rules.budgets, {"cli/a.py": lines(41_601)}, "all Python: 41601"),
    (rules.budgets, {"engine/a.cpp": lines(1499), "engine/a.h": lines(2)}, "1501"),
    (rules.folders, {"lab/a.py": ""}, "lab/: not a room"),
    (rules.folders, {"lab/a.txt": ""}, "lab/: not a room"),
    (rules.folders, {"recipes/rl/a.py": ""}, "recipes/: holds data"),
    (rules.grab_bags, {"rl/utils.py": ""}, "rl/utils.py"),
    (rules.grab_bags, {"rl/common/a.py": ""}, "rl/common/a.py"),
    (rules.levels, {"a.py": "import attending.phi"}, "imports phi/ (level 1) from level 0"),
    (rules.levels, {"a.py": "from .phi import scan"}, "imports phi/"),
    (rules.levels, {"phi/a.py": "from ..model import x"}, "level 1) from level 1"),
    (rules.levels, {"phi/__init__.py": "from ..model import x"}, "imports model/"),
    (rules.levels, {"phi/a/b.py": "from ... import model"}, "imports model/"),
    (rules.levels, {"phi/a.py": "from attending import rl"}, "imports rl/ (level 4)"),
    (rules.levels, {"phi/a.py": "def f():\n    import attending.rl.x as y"}, "a.py:2"),
    (
        rules.levels,
        {"phi/a.py": "if TYPE_CHECKING:\n    from attending.rl import x"},
        "imports rl/",
    ),
    (rules.levels, {"phi/a.py": 'importlib.import_module("attending.rl.loop")'}, "imports rl/"),
    (rules.levels, {"phi/a.py": "import attending"}, "imports attending, neither"),
    (rules.levels, {"phi/a.py": "from attending import load"}, "attending.load, neither"),
    (rules.levels, {"phi/a.py": "from attending.cli import app"}, "cli.app, neither"),
    (rules.prints, {"rl/a.py": "print(1)"}, "rl/a.py:1 print"),
    (rules.prints, {"cli/a.py": "log = print"}, "cli/a.py:1 print"),
    (rules.blanket_excepts, {"a.py": "try: x\nexcept: pass"}, "a.py:2"),
    (rules.blanket_excepts, {"a.py": "try: x\nexcept Exception: pass"}, "a.py:2"),
    (rules.blanket_excepts, {"a.py": "try: x\nexcept BaseException as e: y"}, "a.py:2"),
    (rules.blanket_excepts, {"a.py": "try: x\nexcept (OSError, Exception): y"}, "a.py:2"),
    (rules.blanket_excepts, {"a.py": "try: x\nexcept builtins.Exception: y"}, "a.py:2"),
    (
        rules.blanket_excepts,
        {"a.py": "try: x\nexcept Exception:\n    if y:\n        raise"},
        "a.py:2",
    ),
    (rules.blanket_excepts, {"a.py": "with suppress(Exception): x"}, "a.py:1"),
    (rules.pickles, {"a.py": "import pickle"}, "a.py:1 pickle"),
    (rules.pickles, {"a.py": "def f():\n    from cloudpickle import dumps"}, "a.py:2"),
    (rules.pickles, {"a.py": "import_module('dill')"}, "dill"),
    (rules.pickles, {"a.py": "from torch import load"}, "torch.load"),
    (rules.pickles, {"a.py": "torch.save(x, y)"}, "torch.save"),
    (rules.pickles, {"a.py": "import torch as t\nt.load(y)"}, "a.py:2 torch.load"),
    (rules.pickles, {"a.py": "f(x, weights_only=False)"}, "weights_only=False"),
    (rules.pickles, {"a.py": "m.load_state_dict(x, strict=False)"}, "strict=False"),
    (rules.pickles, {"a.py": "np.load(x, allow_pickle=True)"}, "allow_pickle=True"),
    (rules.undocumented_fields, {"a.py": "class A(Config):\n    x: int"}, "A.x has"),
    (rules.undocumented_fields, {"a.py": "class A(c.Config):\n    x: int = 1"}, "A.x"),
    (
        rules.undocumented_fields,
        {"a.py": "class A(Config):\n    x: int\n    y: int\n    'doc'"},
        "a.py:2 A.x",
    ),
    (rules.undocumented_fields, {"a.py": "class A(Config):\n    x: int\n    ''"}, "A.x"),
    (
        rules.undocumented_fields,
        {"a.py": "class B(A[int]):\n    x: int", "b.py": "class A(Config, Generic[T]): ..."},
        "B.x",
    ),
    (rules.module_docstrings, {"rl/__init__.py": ""}, "rl/__init__.py"),
    (rules.module_docstrings, {"a.py": "# a comment\nx = 1"}, "a.py"),
]

FIELDS = "class A(Config):\n    x: int\n    'doc'\n    _y: int\n    Z: ClassVar[int] = 1"
GOOD: list[tuple[Rule, dict[str, str]]] = [
    (rules.file_sizes, {"a.py": lines(500), "a.json": lines(900)}),
    (rules.function_sizes, {"a.py": function(80)}),
    (rules.function_sizes, {"rl/loop.py": function(70, "_g") + function(120)}),
    (rules.budgets, {"a.py": lines(1800), "cli/a.py": lines(100)}),
    (rules.budgets, {"tokenizer/a.py": lines(250), "engine/a.cpp": lines(1500)}),
    (rules.folders, {"rl/a.py": "", "recipes/rl/a.toml": ""}),
    (rules.folders, {"__pycache__/a.pyc": ""}),
    (rules.grab_bags, {"rl/rollout.py": ""}),
    (rules.levels, {"cli/a.py": "import attending.rl", "__init__.py": "from .rl import x"}),
    (rules.levels, {"a.py": "from . import b", "b.py": "import attending.a"}),
    (
        rules.levels,
        {"verifier/judge/a.py": "from ..patient import x\nfrom ... import b", "b.py": ""},
    ),
    (rules.levels, {"rl/a.py": "from attending.verifier import x\nimport attending.rl.b, os"}),
    (rules.prints, {"a.py": "console.print(1)"}),
    (rules.blanket_excepts, {"a.py": "try: x\nexcept Exception as e:\n    y\n    raise Z from e"}),
    (rules.blanket_excepts, {"a.py": "try: x\nexcept OSError: pass\nwith suppress(OSError): x"}),
    (rules.pickles, {"a.py": "zip(a, b, strict=False)\nf(strict=True, weights_only=True)"}),
    (rules.pickles, {"a.py": "import json\ndcp.save(x)\nsafetensors.torch.load(y)"}),
    (rules.undocumented_fields, {"a.py": FIELDS}),
    (rules.undocumented_fields, {"a.py": "class A(NamedTuple):\n    x: int"}),
    (rules.module_docstrings, {"a.py": '"""Its role."""'}),
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_house_obeys(rule: Rule) -> None:
    found = rule(ROOT)
    assert not found, "\n".join(found)


@pytest.mark.parametrize(("rule", "files", "told"), BAD)
def test_a_rule_bites(tmp_path: Path, rule: Rule, files: dict[str, str], told: str) -> None:
    found = rule(plant(tmp_path, files))
    assert len(found) == 1
    assert told in found[0]


@pytest.mark.parametrize(("rule", "files"), GOOD)
def test_a_rule_lets_good_code_pass(tmp_path: Path, rule: Rule, files: dict[str, str]) -> None:
    assert rule(plant(tmp_path, files)) == []


def test_no_rule_is_without_a_tree_that_breaks_it_and_one_that_does_not() -> None:
    assert len(RULES) == 11
    assert {rule for rule, *_ in BAD} == {rule for rule, _ in GOOD} == set(RULES)


def test_the_rules_look_at_the_real_package() -> None:
    found = {source.path: source for source in sources(ROOT)}
    assert {"attending/config.py", "attending/model/decoder.py"} <= found.keys()
    assert found["attending/model/decoder.py"].room == "model"
    names = {one.name for one in imports(found["attending/config.py"])}
    assert {"tomllib", "attending.errors.ConfigError"} <= names


def test_lines_are_counted_as_an_editor_does(tmp_path: Path) -> None:
    root = plant(tmp_path, {"a.py": "x = 1\n\n# end"})
    assert [source.lines for source in sources(root)] == [3]
    assert isinstance(sources(root)[0], Source)


def test_every_file_of_the_package_is_installed_with_it() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["setuptools"]
    patterns = settings["package-data"]["attending"]
    files = (path for path in (ROOT / "attending").rglob("*.*") if path.is_file())
    built = {".py", ".pyc", ".so"}
    missing = [
        path.name
        for path in files
        if path.suffix not in built
        and not any(path.match(pattern.removeprefix("**/")) for pattern in patterns)
    ]
    assert not missing
