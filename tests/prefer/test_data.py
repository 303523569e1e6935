from collections import Counter
from pathlib import Path

import pytest

from attending.chat import Tokenizer
from attending.errors import ConfigError
from attending.prefer.data import Units, collate, sample_of
from tests.prefer.making import ask, make_model, make_pairs, recipe, write

GOOD = {"prompt": ask("a"), "chosen": "yes", "rejected": "no"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model") / "model")


def units(model: Path, data: Path, method: str = "dpo") -> Units:
    return Units(recipe(model, data, method), Tokenizer.from_folder(model))


def test_an_answer_is_what_the_template_makes_of_it_to_the_end_of_its_turn(
    model: Path, tmp_path: Path
) -> None:
    of = Tokenizer.from_folder(model)
    (unit,) = units(model, write(tmp_path / "rows.jsonl", [GOOD])).units
    begin, end = (of.control_id(name) for name in ("<s>", "</s>"))
    spelled = [of.encode(text, is_first=False) for text in ("u:a", "a:", "yes", "no")]
    assert list(unit.prompt) == [begin, *spelled[0], end, begin, *spelled[1]]
    assert [list(one) for one in unit.answers] == [[*spelled[2], end], [*spelled[3], end]]


def test_what_is_left_out_is_counted_by_its_reason(model: Path, tmp_path: Path) -> None:
    bad = [
        {**GOOD, "chosen": " \n"},
        {**GOOD, "rejected": ""},
        {**GOOD, "rejected": "yes "},
        {**GOOD, "chosen": "y" * 40},
        {**GOOD, "prompt": ask("a" * 40)},
    ]
    found = units(model, write(tmp_path / "rows.jsonl", [*bad, GOOD]))
    assert found.left_out == Counter(empty=2, long=2, equal=1)
    assert [unit.number for unit in found.units] == [6]
    assert found.figures()["data/left_out_long"] == 2
    told = ["1 rows to learn from", "2 left out (empty)", "1 left out (equal)", "2 left out (long)"]
    assert sorted(found.lines()) == sorted(told)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"prompt": ask("a"), "chosen": "yes"},
            r"rows.jsonl, line 2: 'rejected'.*A row of dpo is .*chosen, rejected",
        ),
        ({**GOOD, "chosen": 3}, "line 2"),
        ({**GOOD, "prompt": "a"}, "line 2: messages are a list"),
        ({**GOOD, "prompt": [{"role": "doctor", "content": ""}]}, "'doctor' is not one of"),
        ([], "line 2"),
    ],
)
def test_a_line_that_is_no_such_row_is_named(
    model: Path, tmp_path: Path, row: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        units(model, write(tmp_path / "rows.jsonl", [GOOD, row]))


def test_no_row_to_learn_from_is_refused_with_the_reasons(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"0 rows to learn from, 1 left out \(equal\)"):
        units(model, write(tmp_path / "rows.jsonl", [{**GOOD, "rejected": "yes"}]))
    with pytest.raises(ConfigError, match="0 rows to learn from"):
        units(model, write(tmp_path / "rows.jsonl", []))


def test_every_epoch_draws_each_unit_once_and_goes_on_where_it_stood(
    model: Path, tmp_path: Path
) -> None:
    data = make_pairs(tmp_path / "pairs.jsonl")
    one, other = units(model, data), units(model, data)
    drawn = [unit.number for unit in one.draw(16)]
    assert sorted(drawn[:8]) == sorted(drawn[8:]) == [*range(1, 9)] and drawn[:8] != drawn[8:]
    other.draw(5)
    state = other.state()
    again = units(model, data)
    again.restore(state)
    assert [unit.number for unit in again.draw(11)] == drawn[5:]
    assert one.figures()["data/epochs"] == 2.0


def test_samples_side_by_side() -> None:
    batch = collate([sample_of(([5, 6], 0), ([7, 8], 1)), sample_of(([5], 0), ([9], 2))], "cpu")
    assert batch.ids.tolist() == [5, 6, 7, 5] and batch.targets.tolist() == [6, 7, 8, 9]
    assert batch.weights.tolist() == [0, 1, 1, 1] and batch.lengths == [3, 1]
    assert batch.kinds.tolist() == [0, 0, 0, 1]
