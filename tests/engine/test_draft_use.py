"""A draft beside a model in a folder: found, refused, run, told of."""

from pathlib import Path
from typing import Any

import httpx
import pytest

import attending
from attending.artifact import digest
from attending.engine import loading
from attending.engine.bench import Work, bench
from attending.errors import CheckpointError, UsageError
from attending.model.checkpoint import open_checkpoint
from attending.model.eagle import save_eagle
from attending.model.weights import load_decoder
from tests.engine.drafting import head
from tests.engine.folders import write_model
from tests.engine.served import ASK, client, serve

GREEDY = {"temperature": 0.0, "max_tokens": 30, "seed": 0}
DEEP = {"num_hidden_layers": 4, "max_position_embeddings": 512}


def write_draft(folder: Path, model: Path, **how: Any) -> Path:
    """One that was not trained, for a model in a folder."""
    decoder = load_decoder(open_checkpoint(model))
    eagle = head(decoder, name=model.name, sha256=digest(model), **how)
    folder.mkdir(parents=True)
    state = {n: w.float() if w.is_floating_point() else w for n, w in eagle.state_dict().items()}
    save_eagle(folder, eagle.config, state)
    return folder


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    place = tmp_path_factory.mktemp("pair")
    model = write_model(place / "tiny", **DEEP)
    return str(model), str(write_draft(place / "its-draft", model))


TREE = {"dtype": "float32", "draft_depth": 3, "draft_width": 2, "draft_nodes": 5}


@pytest.mark.parametrize("options", [{}, {"dtype": "float32"}, {"draft_depth": 3}, TREE])
def test_a_model_with_a_draft_answers_the_same(
    pair: tuple[str, str], options: dict[str, Any]
) -> None:
    model, draft = pair
    plain = attending.load(model, **{k: v for k, v in options.items() if k == "dtype"})
    drafted = attending.load(model, draft=draft, threads=1, **options)
    assert (plain.path["draft"], drafted.path["draft"]) == ("none", "its-draft")
    assert plain.path | {"draft": "its-draft"} == drafted.path
    for sampling in (GREEDY, {"temperature": 0.9, "seed": 4, "max_tokens": 30}):
        assert drafted.chat(ASK, **sampling) == plain.chat(ASK, **sampling)
    speculation = drafted.scheduler.speculation
    assert speculation is not None
    # A fixed depth drafts always; else it is left alone as soon as it is known not to pay.
    assert speculation.rounds > (5 if "draft_depth" in options else 0)
    assert speculation.shape.depth == options.get("draft_depth", loading.DEPTH)
    assert speculation.shape.nodes == options.get("draft_nodes", 0)
    assert sum(drafted.page_bytes) > sum(plain.page_bytes)


def test_a_shipped_draft_is_found_by_its_model(
    pair: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = pair
    monkeypatch.setattr(loading, "DRAFTS", tmp_path / "drafts")
    assert attending.load(model).draft is None
    other = write_model(tmp_path / "tiny", **DEEP, rope_theta=5e5)
    write_draft(tmp_path / "drafts" / "b", Path(model))
    write_draft(tmp_path / "drafts" / "a", other)  # of the same name, and not the same
    found = attending.load(model).draft
    assert found is not None and found.name == "b"
    assert attending.load(model, draft="none").draft is None


def test_a_draft_of_another_model_is_refused_with_both_names(
    pair: tuple[str, str], tmp_path: Path
) -> None:
    _, draft = pair
    other = write_model(tmp_path / "other", **DEEP, rope_theta=5e5)
    with pytest.raises(CheckpointError, match=r"trained for tiny \(sha256 .*not for other \(sha"):
        attending.load(str(other), draft=draft).chat(ASK, **GREEDY)
    for options in ({"draft_depth": 3}, {"draft_width": 2, "dtype": "float32"}):
        with pytest.raises(UsageError, match="draft_depth or draft_width is given: there is no"):
            attending.load(str(other), **options).chat(ASK, **GREEDY)


def test_a_tree_needs_torch_and_a_width(pair: tuple[str, str]) -> None:
    model, draft = pair
    with pytest.raises(UsageError, match="draft_width 2: trees are checked by torch's runner"):
        attending.load(model, draft=draft, draft_width=2)
    with pytest.raises(UsageError, match="draft_nodes 5: of a tree; give a draft_width"):
        attending.load(model, draft=draft, draft_nodes=5)
    told = attending.load(model, draft=draft, draft_width=2, dtype="float32").draft
    assert told is not None and told.shape == (loading.DEPTH, 2, 2 * loading.DEPTH)


def test_a_gated_draft_needs_torch(pair: tuple[str, str], tmp_path: Path) -> None:
    model, _ = pair
    gated = str(write_draft(tmp_path / "gated", Path(model), gated=True))
    with pytest.raises(UsageError, match="a gated draft is run by torch alone"):
        attending.load(model, draft=gated).chat(ASK, **GREEDY)
    plain = attending.load(model, dtype="float32").chat(ASK, **GREEDY)
    assert attending.load(model, dtype="float32", draft=gated).chat(ASK, **GREEDY) == plain


def test_the_server_drafts_unless_told_not_to_and_says_how_well(pair: tuple[str, str]) -> None:
    model, draft = pair
    with serve(Path(model), draft=draft, draft_depth=2, threads=1) as (url, service):
        api = client(url)

        def ask(**more: Any) -> Any:
            return api.chat.completions.create(
                model="tiny", messages=ASK, temperature=0, max_tokens=20, extra_body=more
            )

        assert "_draft_break_even_batch 0.0" in httpx.get(f"{url}/metrics").text
        plain = ask(speculate=False)
        told = service._model.scheduler.speculation
        assert told is not None and told.rounds == 0
        assert ask().choices[0].message == plain.choices[0].message
        assert told.rounds > 5
        assert api.models.list().data[0].model_dump()["path"]["draft"] == "its-draft"
        lines = httpx.get(f"{url}/metrics").text.splitlines()
        values = {
            line.rpartition(" ")[0]: float(line.rpartition(" ")[2])
            for line in lines
            if line[0] != "#"
        }
        name = "attending_engine_draft"
        assert values[f"{name}_acceptance_length"] == told.acceptance_length >= 1
        assert values[f"{name}_rounds_total"] == told.rounds
        assert values[f'{name}_acceptance{{position="2"}}'] == told.acceptance[1]
        assert 0 <= values[f"{name}_break_even_batch"] <= 32
        assert values[f"{name}_depth"] == told.latest


def test_bench_measures_both_ways(pair: tuple[str, str]) -> None:
    model, draft = pair
    work = Work((1, 2), 16, 12, 1)
    report = bench(model, work, options={"draft": draft, "threads": 1})
    assert report.path["draft"] == "its-draft" and report.speedup is not None
    assert report.accept_length is not None and report.accept_length.median >= 1
    assert "tokens of a round" in [row[0] for row in report.table()[1]]
    assert bench(model, work, options={"draft": "none", "threads": 1}).speedup is None
