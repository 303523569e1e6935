"""The house rules about code: each function takes the repository's root and returns violations.

They read the code and never import it, so all of them together take a second.
"""

import ast
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

FILE_LINES, FUNCTION_LINES, LOOP_LINES = 500, 80, 120
PYTHON_LINES, NATIVE_LINES = 41_600, 1_500
HALLWAY = ""
FUNCTION = ast.FunctionDef | ast.AsyncFunctionDef


class Room(NamedTuple):
    """A folder of the package: what it may import, and how large it may be."""

    level: int
    max_lines: int


ROOMS = {
    HALLWAY: Room(0, 2_530),
    "phi": Room(1, 2_110),
    "tokenizer": Room(2, 250),
    "model": Room(1, 3_285),
    "verifier": Room(1, 4_820),
    "corpus": Room(2, 2_260),
    "train": Room(2, 2_050),
    "engine": Room(2, 5_790),
    "evaluate": Room(3, 3_760),
    "pretrain": Room(4, 470),
    "midtrain": Room(4, 550),
    "sft": Room(4, 1_150),
    "prefer": Room(4, 1_080),
    "rl": Room(4, 3_620),
    "quantize": Room(4, 3_250),
    "draft": Room(4, 1_450),
    "gateway": Room(5, 1_400),
}
DATA = {"recipes", "configs"}  # folders without code
FRONT = "cli"  # the command line; it and attending/__init__.py import every room, lazily
GRAB_BAGS = {"utils", "util", "common", "helpers", "misc"}
PICKLES = {"pickle", "_pickle", "cloudpickle", "dill", "shelve", "marshal", "joblib"}
UNSAFE = {("weights_only", "False"), ("strict", "False"), ("allow_pickle", "True")}


class Source(NamedTuple):
    """A Python file."""

    path: str
    text: str
    tree: ast.Module

    @property
    def lines(self) -> int:
        """Physical lines."""
        return len(self.text.splitlines())

    @property
    def room(self) -> str:
        """The folder below the package; the hallway for its own files."""
        parts = Path(self.path).parts
        return parts[1] if len(parts) > 2 else HALLWAY

    @property
    def is_front(self) -> bool:
        """It may import every room, and no room imports it."""
        return self.room == FRONT or self.path == "attending/__init__.py"


class Import(NamedTuple):
    """One imported name, in full: `from a import b` is a.b."""

    name: str
    line: int


def sources(root: Path, *folders: str) -> list[Source]:
    """The Python files below some folders; by default, the package."""
    paths = sorted(
        path for name in folders or ["attending"] for path in (root / name).rglob("*.py")
    )
    texts = [path.read_text(encoding="utf-8") for path in paths]
    return [
        Source(path.relative_to(root).as_posix(), text, _parse(text, str(path)))
        for path, text in zip(paths, texts, strict=True)
    ]


def file_sizes(root: Path) -> list[str]:
    """A file has at most 500 lines."""
    return [
        f"{source.path}: {source.lines} lines, at most {FILE_LINES}"
        for source in sources(root, "attending", "tests", "benchmarks")
        if source.lines > FILE_LINES
    ]


def function_sizes(root: Path) -> list[str]:
    """A function has at most 80 lines; the entry of a loop.py, its first public one, 120."""
    found = []
    for source in sources(root, "attending", "tests", "benchmarks"):
        named = [node for node in source.tree.body if isinstance(node, FUNCTION)]
        public = [node for node in named if not node.name.startswith("_")]
        entry = public[0] if public and Path(source.path).name == "loop.py" else None
        for node in ast.walk(source.tree):
            if isinstance(node, FUNCTION):
                limit = LOOP_LINES if node is entry else FUNCTION_LINES
                lines = (node.end_lineno or 0) - node.lineno + 1
                if lines > limit:
                    found.append(
                        f"{source.path}:{node.lineno} {node.name}: {lines} lines > {limit}"
                    )
    return found


def budgets(root: Path) -> list[str]:
    """Each room, all Python and all native code keep to their lines."""
    used = dict.fromkeys(ROOMS, 0)
    total = 0
    for source in sources(root):
        total += source.lines
        if not source.is_front and source.room in ROOMS:
            used[source.room] += source.lines
    suffixes = {".c", ".cc", ".cpp", ".h", ".hpp"}
    native = [path for path in (root / "attending").rglob("*") if path.suffix in suffixes]
    lines = sum(len(path.read_text(encoding="utf-8").splitlines()) for path in native)
    limits = [(name or "the hallway", used[name], room.max_lines) for name, room in ROOMS.items()]
    limits += [("all Python", total, PYTHON_LINES), ("native code", lines, NATIVE_LINES)]
    return [f"{name}: {size} lines, at most {most}" for name, size, most in limits if size > most]


def folders(root: Path) -> list[str]:
    """Every folder is a room of the table or known data, and data holds no code."""
    found = []
    for folder in sorted((root / "attending").iterdir()):
        files = [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".pyc"]
        if folder.is_dir() and files and folder.name not in ROOMS.keys() | DATA | {FRONT}:
            found.append(f"attending/{folder.name}/: not a room; known: {', '.join(ROOMS)}")
        if folder.name in DATA and any(path.suffix == ".py" for path in files):
            found.append(f"attending/{folder.name}/: holds data, not code")
    return found


def grab_bags(root: Path) -> list[str]:
    """No utils.py: a module is named by what it is about."""
    named = [(source.path, Path(source.path).with_suffix("").parts) for source in sources(root)]
    return [f"{path}: name it by what it is" for path, parts in named if GRAB_BAGS & {*parts}]


def levels(root: Path) -> list[str]:
    """A room imports rooms of lower levels; the hallway, level 0, only itself."""
    found = []
    for source in sources(root):
        room = ROOMS.get(source.room)
        if source.is_front or room is None:  # `folders` reports an unknown room
            continue
        for name, line in imports(source):
            package, _, rest = name.partition(".")
            target = rest.partition(".")[0]
            if package != "attending" or (target and target == source.room):
                continue
            where = f"{source.path}:{line}"
            if target in ROOMS and target != HALLWAY:
                if ROOMS[target].level >= room.level:
                    found.append(
                        f"{where} imports {target}/ (level {ROOMS[target].level}) "
                        f"from level {room.level}"
                    )
            elif target == FRONT or not (root / f"attending/{target}.py").is_file():
                found.append(f"{where} imports {name}, neither a lower room nor in the hallway")
    return found


def imports(source: Source) -> Iterator[Import]:
    """Every import, wherever it stands: relative ones resolved, `import_module("...")` too."""
    package = Path(source.path).parent.parts
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else ()
            prefix = [*base, node.module] if node.module else base
            for alias in node.names:
                yield Import(".".join([*prefix, alias.name]), node.lineno)
        elif isinstance(node, ast.Call) and _name(node.func) in ("import_module", "__import__"):
            words = [arg.value for arg in node.args[:1] if isinstance(arg, ast.Constant)]
            yield from (Import(str(word), node.lineno) for word in words)


def prints(root: Path) -> list[str]:
    """Nothing prints; the command line writes to its consoles."""
    return [
        f"{source.path}:{node.lineno} print; use logging, or return it to the command line"
        for source in sources(root)
        for node in ast.walk(source.tree)
        if isinstance(node, ast.Name) and node.id == "print"
    ]


def blanket_excepts(root: Path) -> list[str]:
    """What catches everything ends by raising; nothing is suppressed wholesale."""
    found = []
    for source in sources(root):
        for node in ast.walk(source.tree):
            line = 0
            if isinstance(node, ast.ExceptHandler) and not isinstance(node.body[-1], ast.Raise):
                line = node.lineno if node.type is None or _is_blanket(node.type) else 0
            elif isinstance(node, ast.Call) and _name(node.func) == "suppress":
                line = node.lineno if any(_is_blanket(arg) for arg in node.args) else 0
            if line:
                found.append(f"{source.path}:{line} catches everything; name the errors")
    return found


def pickles(root: Path) -> list[str]:
    """No pickle on any path, and no lenient loading."""
    found = []
    for source in sources(root):
        torches = {"torch"}
        for name, line in imports(source):
            if name.partition(".")[0] in PICKLES or name in ("torch.save", "torch.load"):
                found.append(f"{source.path}:{line} {name}: use safetensors or JSON")
        for node in ast.walk(source.tree):
            if isinstance(node, ast.alias) and node.name == "torch":
                torches.add(node.asname or "torch")
        for node in ast.walk(source.tree):
            if isinstance(node, ast.Attribute) and node.attr in ("save", "load"):
                if _name(node.value) in torches and isinstance(node.value, ast.Name):
                    found.append(f"{source.path}:{node.lineno} torch.{node.attr}: use safetensors")
            elif isinstance(node, ast.Call) and _name(node.func) != "zip":
                told = {(word.arg or "", ast.unparse(word.value)) for word in node.keywords}
                found += [f"{source.path}:{node.lineno} {k}={v}" for k, v in sorted(told & UNSAFE)]
    return found


def undocumented_fields(root: Path) -> list[str]:
    """Every field of a Config, however indirect, has its docstring under it."""
    found = []
    classes = [
        (source, node)
        for source in sources(root)
        for node in ast.walk(source.tree)
        if isinstance(node, ast.ClassDef)
    ]
    configs, before = {"Config"}, 0
    while len(configs) > before:
        before = len(configs)
        configs |= {node.name for _, node in classes if configs & {_name(b) for b in node.bases}}
    for source, node in classes:
        if node.name not in configs:
            continue
        for field, after in zip(node.body, [*node.body[1:], None], strict=True):
            if not isinstance(field, ast.AnnAssign) or "ClassVar" in ast.unparse(field.annotation):
                continue
            name = ast.unparse(field.target)
            if not name.startswith("_") and not _is_text(after):
                found.append(f"{source.path}:{field.lineno} {node.name}.{name} has no docstring")
    return found


def module_docstrings(root: Path) -> list[str]:
    """Every module of the package says its role."""
    return [
        f"{source.path}: no module docstring"
        for source in sources(root)
        if not (ast.get_docstring(source.tree) or "").strip()
    ]


@functools.cache
def _parse(text: str, name: str) -> ast.Module:
    return ast.parse(text, name)


def _name(node: ast.expr) -> str:
    """The last word: of `a.b.C[T]`, C."""
    node = node.value if isinstance(node, ast.Subscript) else node
    return ast.unparse(node).rpartition(".")[2]


def _is_blanket(node: ast.expr) -> bool:
    parts = node.elts if isinstance(node, ast.Tuple) else [node]
    return any(_name(part) in ("Exception", "BaseException") for part in parts)


def _is_text(node: ast.stmt | None) -> bool:
    if not isinstance(node, ast.Expr) or not isinstance(node.value, ast.Constant):
        return False
    return isinstance(node.value.value, str) and bool(node.value.value.strip())
