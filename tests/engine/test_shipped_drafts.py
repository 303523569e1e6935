"""The drafts in the package: small, of a model in the catalogue, trained on what it wrote."""

import json
import re
from pathlib import Path

import pytest

import attending
from attending.engine import loading
from attending.model.eagle_files import open_eagle
from attending.model.files import gguf_in
from attending.sources import CATALOGUE, resolve
from tests.engine.served import ASK

MOST_BYTES, MOST_WORDS = 24 * 2**20, 12_000
FOLDERS = [file.parent for file in sorted(Path(str(loading.DRAFTS)).glob("*/config.json"))]
MATHS = [{"role": "user", "content": "Tom has 3 bags of 4 apples and eats 2. How many are left?"}]


def of_default() -> list[str]:
    """Names of those for the default model."""
    sha256 = CATALOGUE["default"].sha256
    return [one.name for one in FOLDERS if open_eagle(one)[0].target_sha256 == sha256]


def test_there_is_one_for_the_default_model() -> None:
    assert of_default()


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_a_shipped_draft_is_small_and_names_its_target_and_its_training(folder: Path) -> None:
    assert sum(file.stat().st_size for file in folder.iterdir()) <= MOST_BYTES
    config, tensors = open_eagle(folder)
    assert config.draft_vocab <= MOST_WORDS and len(tensors["lm_head.weight"]) == config.draft_vocab
    text = (folder / "run.json").read_text("utf-8")
    assert not re.search(r'"[/~]', text)  # a path of the machine that trained it
    record = json.loads(text)
    assert record["verb"] == "draft"
    assert config.target_sha256 == CATALOGUE[record["recipe"]["model"]].sha256
    assert config.target_sha256 in {parent["sha256"] for parent in record["parents"]}


def test_the_default_model_takes_its_draft_by_itself_and_answers_the_same(
    default_cache: Path,
) -> None:
    plain, drafted = attending.load("default", draft="none"), attending.load("default")
    assert plain.draft is None and drafted.draft is not None
    told = {"temperature": 0.0, "max_tokens": 60, "seed": 0}
    for messages in (ASK, MATHS):
        assert drafted.chat(messages, **told) == plain.chat(messages, **told)


def test_by_its_name_and_at_a_fixed_depth_its_proposals_are_accepted(default_cache: Path) -> None:
    for name in of_default():
        model = attending.load("default", draft=name, draft_depth=3)
        model.chat(ASK, temperature=0.0, max_tokens=60)
        speculation = model.scheduler.speculation
        assert speculation is not None and speculation.rounds > 5
        assert speculation.acceptance_length > 1.4


def test_the_same_file_takes_it_under_any_name(default_cache: Path, tmp_path: Path) -> None:
    named = tmp_path / "another-name.gguf"
    named.symlink_to(gguf_in(resolve("default").path))
    assert attending.load(str(named)).path["draft"] in of_default()
