"""Metrics survive crashes and resumes; log lines keep to their stream."""

import json
import logging
from pathlib import Path

import pytest

from attending import logs
from attending.logs import MetricLog, read_metrics


def test_a_resumed_file_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    for path in (whole, cut):
        log = MetricLog(path)
        for step in range(6 if path is whole else 5):
            log.write(step, {"train/loss": 1.0 / (step + 1)})
            if step == 3:
                saved = path.stat().st_size  # with the state
        log.close()
    with cut.open("a") as file:
        file.write('{"step": 5, "train/lo')  # killed in the middle of a line
    log = MetricLog(cut, keep_bytes=saved)
    for step in range(4, 6):
        log.write(step, {"train/loss": 1.0 / (step + 1)})
    log.close()
    rows = [[(r["step"], r["train/loss"]) for r in read_metrics(p)] for p in (whole, cut)]
    assert rows[0] == rows[1] and len(rows[0]) == 6


def test_without_a_state_whole_lines_stay_and_the_clock_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "run/elapsed_seconds": 100.0}\n{"step": 2, "r', "utf-8")
    log = MetricLog(path)
    log.write(2, {"train/loss": 1.0})
    log.close()
    rows = list(read_metrics(path))
    assert [row["step"] for row in rows] == [1, 2]
    assert 100.0 <= rows[1]["run/elapsed_seconds"] < 160.0


@pytest.mark.parametrize("name", ["loss", "Train/loss", "train/", "train/lo ss"])
def test_a_metric_has_an_area_and_a_noun(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="area/noun_unit"):
        MetricLog(tmp_path / "m.jsonl").write(0, {name: 1.0})


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_value_that_is_not_a_number_stops_the_run(tmp_path: Path, value: float) -> None:
    with pytest.raises(ValueError, match=r"train/loss is .* at step 4"):
        MetricLog(tmp_path / "m.jsonl").write(4, {"train/loss": value})


def test_log_lines_go_to_standard_error_as_text_or_json(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    logs.setup(as_json=True)
    logging.getLogger("attending.x").info("hello %d", 3)
    logging.getLogger("attending.x").debug("hidden")
    logs.setup(debug=True)
    logging.getLogger("attending.x").debug("shown")
    monkeypatch.setenv("RANK", "1")
    logs.setup()
    logging.getLogger("attending.x").warning("another rank is quiet")
    said = capsys.readouterr()
    assert said.out == ""
    first, second = said.err.splitlines()
    assert json.loads(first)["message"] == "hello 3" and "hidden" not in said.err
    assert second == "DEBUG attending.x: shown"
