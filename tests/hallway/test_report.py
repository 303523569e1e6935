"""The report page: whole, self-contained, and made of the two files only."""

import base64
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from attending.errors import CheckpointError, UsageError
from attending.logs import MetricLog
from attending.report import write_report

RUN: dict[str, Any] = {
    "verb": "sft",
    "command": "attending sft tiny --set note='<b>&\"'",
    "commit": "0123abc+changes",
    "seed": 12345,
    "recipe": {
        "optim": {"note": "</pre><script>alert(1)</script>", "rate": 0.001},
        "topic": "胸痛",
    },
    "parents": [{"uri": "hf:org/<i>base</i>", "sha256": "ff00"}, {"uri": "data", "sha256": None}],
    "versions": {"python": "3.11.7", "torch": "2.13.0"},
    "hardware": {"cpu": "A <CPU>", "memory_bytes": 2**30, "simd": ["avx2", "neon"], "gpus": []},
    "started": "2025-01-01T00:00:00+00:00",
    "wall_seconds": 12.5,
    "metrics": {"eval/score": 0.125},
}


class Page(HTMLParser):
    """The tags, attributes and texts of a page, as a browser would see them."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.texts: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        self.texts.append(data.strip())

    def rows(self) -> str:
        return "|".join(text for text in self.texts if text)


FUNNEL = {
    "rows": [
        {
            "step": "clean",
            "domain": domain,
            "source": source,
            "in": {"documents": entered, "bytes": size},
            "out": {"documents": entered - len(removed), "bytes": size - 100 * len(removed)},
            "removed": removed,
        }
        for domain, source, entered, size, removed in (
            ("medical", "a", 4, 400, {"empty": 1, "too_short": 1}),
            ("medical", "b", 3, 300, {}),
            ("general", "c", 1, 10, {}),
        )
    ],
    "samples": [
        {
            "step": "clean",
            "reason": "too_short",
            "id": "1",
            "source": "a",
            "bytes": 5,
            "text": "<b>bold</b> 胸痛",
        },
        {"step": "clean", "reason": "empty", "file": "x", "line": 3, "source": "a", "bytes": 0},
    ],
    "tokens": [
        {
            "part": "train",
            "domain": "medical",
            "source": "a",
            "documents": 5,
            "bytes": 500,
            "tokens": 90,
            "seen_tokens": 180,
        }
    ],
    "notes": {"repeated_ids": 2},
}


def run_folder(tmp_path: Path, *, run: object = RUN) -> Path:
    folder = tmp_path / "a<b>run"
    folder.mkdir()
    log = MetricLog(folder / "metrics.jsonl")
    for step in range(5):
        late = {"eval/score": step / 32} if step == 4 else {}
        log.write(step, {"train/loss": 2.0 - step / 4, "train/tokens": 10_000 * step, **late})
    log.close()
    if run is not None:
        (folder / "run.json").write_text(json.dumps(run), encoding="utf-8")
    return folder


def page_of(folder: Path) -> Page:
    return Page(write_report(folder).read_text(encoding="utf-8"))


def test_the_page_lies_in_the_folder_and_no_draft_does(tmp_path: Path) -> None:
    folder = run_folder(tmp_path)
    assert write_report(folder) == folder / "report.html"
    assert write_report(folder) == folder / "report.html"  # again: replaced
    names = {path.name for path in folder.iterdir()}
    assert names == {"metrics.jsonl", "run.json", "report.html"}


def test_every_metric_has_its_final_values_and_a_plot_if_it_is_a_curve(
    tmp_path: Path,
) -> None:
    page = page_of(run_folder(tmp_path))
    assert "train/loss|1|4|1|2|5" in page.rows()
    assert "train/tokens|40,000|4|0|40,000|5" in page.rows()
    assert "eval/score|0.125|4|0.125|0.125|1" in page.rows()
    images = [value for name, value in page.attributes if name == "src"]
    assert len(images) == 3  # with run/elapsed_seconds, without eval/score
    assert len(set(images)) == 3
    for image in images:
        kind, _, data = image.partition(",")
        assert kind == "data:image/png;base64"
        assert base64.b64decode(data).startswith(b"\x89PNG")


def test_plots_are_grouped_by_area_with_the_clock_last(tmp_path: Path) -> None:
    html = write_report(run_folder(tmp_path)).read_text(encoding="utf-8")
    assert re.findall(r"<h2>(.*?)</h2>", html) == ["Final values", "train", "run"]


def test_the_run_is_told_with_command_commit_and_versions(tmp_path: Path) -> None:
    rows = page_of(run_folder(tmp_path)).rows()
    for fact in (
        f"command|{RUN['command']}",
        "commit|0123abc+changes",
        "seed|12345",
        "wall seconds|12.5",
        "torch|2.13.0",
        "cpu|A <CPU>",
        "memory bytes|1,073,741,824",
        "simd|avx2, neon",
        "gpus|none",
        "parent|hf:org/<i>base</i> (sha256 ff00)",
        "parent|data (sha256 not recorded)",
        "胸痛",
    ):
        assert fact in rows


def test_texts_are_shown_and_never_become_markup(tmp_path: Path) -> None:
    page = page_of(run_folder(tmp_path))
    assert not {"script", "b", "i", "cpu"} & set(page.tags)
    assert "a<b>run" in page.texts
    assert any("<script>alert(1)</script>" in text for text in page.texts)


def test_the_page_reaches_no_network(tmp_path: Path) -> None:
    page = page_of(run_folder(tmp_path))
    links = [
        value for name, value in page.attributes if name in ("src", "href", "action", "srcset")
    ]
    assert all(link.startswith("data:") for link in links)
    assert not {"link", "script", "iframe", "form"} & set(page.tags)
    policies = [value for _, value in page.attributes if value.startswith("default-src 'none'")]
    assert len(policies) == 1


def test_a_run_that_has_not_ended_has_a_page_that_says_so(tmp_path: Path) -> None:
    rows = page_of(run_folder(tmp_path, run=None)).rows()
    assert "the run has not ended" in rows
    assert "train/loss|1|4|1|2|5" in rows


def test_facts_that_a_run_lacks_are_called_not_recorded(tmp_path: Path) -> None:
    rows = page_of(run_folder(tmp_path, run={"verb": "sft", "seed": None})).rows()
    assert "seed|not recorded" in rows
    assert "command|not recorded" in rows


def test_a_half_written_last_line_is_left_out(tmp_path: Path) -> None:
    folder = run_folder(tmp_path)
    with (folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"step": 5, "train/lo')
    assert "train/loss|1|4|1|2|5" in page_of(folder).rows()


def test_a_missing_folder_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="not a folder"):
        write_report(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (None, "does not exist"),
        ("", "is empty"),
        ('{"step": 1}\n', "is empty"),
        ('{"step": 1, "a/b": 1', "is empty"),
        ("not json\n", "damaged at 'not json'"),
        ('[1]\n{"step": 1, "a/b": 1}\n', "damaged"),
        ('{"a/b": 1}\n', "damaged"),
        ('{"step": "1", "a/b": 1}\n', "damaged"),
        ('{"step": 1.5, "a/b": 1}\n', "damaged"),
        ('{"step": 1, "a/b": NaN}\n', "damaged"),
        ('{"step": 1, "a/b": "high"}\n', "damaged"),
        ('{"step": 1, "a/b": true}\n', "damaged"),
    ],
)
def test_metrics_that_cannot_be_drawn_are_an_error_and_no_page(
    tmp_path: Path, text: str | None, told: str
) -> None:
    if text is not None:
        (tmp_path / "metrics.jsonl").write_text(text, encoding="utf-8")
    with pytest.raises(CheckpointError, match=told):
        write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize("text", ["{", "[]", "null", ""])
def test_a_damaged_record_is_an_error(tmp_path: Path, text: str) -> None:
    folder = run_folder(tmp_path, run=None)
    (folder / "run.json").write_text(text, encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"run\.json is damaged"):
        write_report(folder)


def test_importing_the_module_does_not_import_matplotlib() -> None:
    code = "import sys, attending.report; print('matplotlib' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_a_funnel_is_drawn_told_and_sampled_and_its_texts_stay_text(tmp_path: Path) -> None:
    folder = run_folder(tmp_path)
    (folder / "funnel.json").write_text(json.dumps(FUNNEL), encoding="utf-8")
    page = page_of(folder)
    rows = page.rows()
    assert "clean|medical|7|5|700|500|empty 1, too_short 1" in rows
    assert "clean|general|1|1|10|10|0" in rows
    assert "train|medical|a|5|500|90|180" in rows
    assert "<b>bold</b> 胸痛" in rows and "b" not in page.tags
    images = [value for name, value in page.attributes if name == "src"]
    assert len(images) == 4


@pytest.mark.parametrize("text", ["{", "[]", '{"rows": 1}', '{"rows": [{}]}', '{"x": 1}'])
def test_a_damaged_funnel_is_an_error(tmp_path: Path, text: str) -> None:
    folder = run_folder(tmp_path)
    (folder / "funnel.json").write_text(text, encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"funnel\.json is damaged"):
        write_report(folder)


def test_samples_are_shown_newest_first_and_as_text(tmp_path: Path) -> None:
    log = MetricLog(tmp_path / "metrics.jsonl")
    log.write(1, {"train/loss_nats": 1.0})
    log.close()
    rows = [{"step": n, "prompt": "aspirin", "text": f"<b>{n}</b>"} for n in (1, 2)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "samples.jsonl").write_text(text, "utf-8")
    page = write_report(tmp_path).read_text("utf-8")
    assert page.index("&lt;b&gt;2") < page.index("&lt;b&gt;1")
    (tmp_path / "samples.jsonl").write_text('{"step": 1}\n', "utf-8")
    with pytest.raises(CheckpointError, match=r"samples.jsonl is damaged at"):
        write_report(tmp_path)
