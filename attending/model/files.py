"""Which files make a model, and what its configuration says; without torch, for planning."""

import json
from pathlib import Path
from typing import Any

from attending.chat import Tokenizer
from attending.errors import CheckpointError, TokenizerError
from attending.model.architecture import Architecture, parse_config
from attending.model.gguf_file import open_gguf, part_files
from attending.model.gguf_tokenizer import tokenizer_config, tokenizer_json

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


def read_config(path: Path) -> Architecture:
    """The architecture of a model folder, a `config.json` or a GGUF file; weights are not needed.

    Raises:
        CheckpointError: There is no configuration, or it cannot be read.
    """
    gguf = gguf_in(path)
    if gguf is not None:
        return parse_config(open_gguf(gguf).hf_config())
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise CheckpointError(f"{path.name} has no config.json; {_found(path)}")
    return parse_config(read_json(file))


def read_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of a folder, a `tokenizer.json` or a GGUF file.

    Raises:
        TokenizerError: There is none, or it cannot be read.
        CheckpointError: The GGUF file is damaged.
    """
    if gguf := gguf_in(path):
        metadata = open_gguf(gguf).metadata
        return Tokenizer(tokenizer_json(metadata), tokenizer_config(metadata))
    if not path.is_dir() and path.name != "tokenizer.json":
        raise TokenizerError(f"{path.name} is no folder, tokenizer.json or .gguf file.")
    return Tokenizer.from_folder(path if path.is_dir() else path.parent)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder, by its index if it has one."""
    index = folder / INDEX
    if index.is_file():
        named = sorted(set(read_json(index).get("weight_map", {}).values()))
        missing = [name for name in named if not (folder / name).is_file()]
        if missing or not named:
            raise CheckpointError(
                f"{folder.name}: {len(missing)} of {len(named)} shards that {INDEX} names are "
                f"missing: {first(missing)}. Get the model again."
            )
        return [folder / name for name in named]
    files = sorted(folder.glob("*.safetensors")) if folder.is_dir() else []
    if len(files) != 1:
        raise CheckpointError(
            f"{folder.name} has no {SINGLE} and no {INDEX}; {_found(folder)} If it is being "
            "trained, run its recipe to the end first."
        )
    return files


def model_files(path: Path) -> list[Path]:
    """The files that weights and configuration are read from."""
    gguf = gguf_in(path)
    return part_files(gguf) if gguf else [path / "config.json", *weight_files(path)]


def gguf_in(path: Path) -> Path | None:
    """The GGUF file that a path means, if any; a folder's safetensors come first."""
    if path.suffix == ".gguf":
        return path
    if not path.is_dir() or (path / "config.json").exists():
        return None
    files = sorted(path.glob("*.gguf"))
    if len(files) > 1 and "-00001-of-" not in files[0].name:
        raise CheckpointError(
            f"{path.name} holds {len(files)} GGUF files; name one: {first([f.name for f in files])}"
        )
    return files[0] if files else None


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object; a CheckpointError if it is anything else."""
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{file.name} is not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{file.name} must hold a JSON object.")
    return values


def _found(path: Path) -> str:
    if not path.is_dir():
        return "it is not a folder." if path.exists() else "it does not exist."
    return f"found: {first(sorted(entry.name for entry in path.iterdir()))}."


def first(names: list[str], most: int = 5) -> str:
    """A few names for an error message, and how many more."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return (", ".join(names[:most]) or "nothing") + more
