"""The files of a run: what it was made with, what was asked, answered, judged.

`plan.json` holds the settings; a run that goes on with others is refused, not mixed. Answers and
grades are lines that are there as soon as they are known; where an answer was judged twice, the
last line counts.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from attending import logs
from attending.artifact import disk_has_room, without_folders, write_json
from attending.errors import CheckpointError, UsageError
from attending.evaluate.sample import Answer, Grade, Key, Sample, Task, read_lines


class Store:
    """One folder."""

    def __init__(self, folder: Path, *, resume: bool) -> None:
        """UsageError where it holds a run already and none is to be resumed."""
        if folder.exists() and not folder.is_dir():
            raise UsageError(f"{folder.name} is a file: give --out a folder.")
        if (folder / "plan.json").exists() and not resume:
            raise UsageError(
                f"{folder.name} holds a run: go on with it by --resume, or give another --out."
            )
        self.folder = folder
        (folder / "examples").mkdir(parents=True, exist_ok=True)

    def hold(self, key: str, value: Any) -> None:
        """Keep what the run is made with; UsageError where it was begun with something else."""
        file = self.folder / "plan.json"
        plan = json.loads(file.read_text("utf-8")) if file.is_file() else {}
        value = json.loads(json.dumps(without_folders(value)))
        if plan.setdefault(key, value) != value:
            raise UsageError(
                f"{self.folder.name} was begun with another {key}: {_differing(plan[key], value)}. "
                "Give another --out, or what it was begun with."
            )
        draft = file.with_suffix(".tmp")
        with disk_has_room(file):
            write_json(draft, plan)
            draft.replace(file)

    def write_examples(self, task: Task) -> None:
        """What is asked, for the page."""
        rows = ({"id": e.id, "messages": e.messages, "tags": e.tags} for e in task.examples)
        self._write_all(self.folder / "examples" / f"{task.name}.jsonl", rows)

    def answers(self, model: str, task: Task) -> dict[Key, Answer]:
        """Those to the task's examples."""
        wanted = {one.id for one in task.examples}
        rows = (Answer(**row) for row in self._rows(model, task, "answers"))
        return {one.key: one for one in rows if one.id in wanted}

    def grades(self, model: str, task: Task) -> dict[Key, Grade]:
        """Of answers; the last one of each."""
        rows = self._rows(model, task, "grades")
        return {(row.pop("id"), row.pop("repeat")): Grade(**row) for row in rows}

    def write_grades(self, model: str, task: Task, samples: Sequence[Sample]) -> None:
        """All at once: of a task that needs no judge."""
        rows = (_graded(one.answer, one.grade) for one in samples)
        self._write_all(self._file(model, task, "grades"), rows)

    @contextmanager
    def adding_answers(self, model: str, task: Task) -> Iterator[Callable[[Answer], None]]:
        """What appends one."""
        with self._adding(self._file(model, task, "answers")) as add:
            yield lambda answer: add(asdict(answer))

    @contextmanager
    def adding_grades(self, model: str, task: Task) -> Iterator[Callable[[Answer, Grade], None]]:
        """What appends one."""
        with self._adding(self._file(model, task, "grades")) as add:
            yield lambda answer, grade: add(_graded(answer, grade))

    def _file(self, model: str, task: Task, kind: str) -> Path:
        return self.folder / model / f"{task.name}.{kind}.jsonl"

    def _rows(self, model: str, task: Task, kind: str) -> Iterator[dict[str, Any]]:
        path = self._file(model, task, kind)
        logs.cut(path)  # of a last line that a crash left half-written
        try:
            yield from read_lines(path)
        except TypeError as error:
            raise CheckpointError(f"{path.name} is not of this version ({error}).") from None

    @contextmanager
    def _adding(self, path: Path) -> Iterator[Callable[[Mapping[str, Any]], None]]:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:

            def add(row: Mapping[str, Any]) -> None:
                with disk_has_room(path):
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")
                    file.flush()

            yield add

    def _write_all(self, path: Path, rows: Iterator[Mapping[str, Any]]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_suffix(".tmp")
        with disk_has_room(path):
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            draft.write_text(text, encoding="utf-8")
            draft.replace(path)


def _graded(answer: Answer, grade: Grade) -> dict[str, Any]:
    return {"id": answer.id, "repeat": answer.repeat, **asdict(grade)}


def _differing(a: Any, b: Any, at: str = "") -> str:
    """Where two plans differ first, with both values."""
    if isinstance(a, dict) and isinstance(b, dict):
        key = next(key for key in sorted({*a, *b}) if a.get(key) != b.get(key))
        return _differing(a.get(key), b.get(key), f"{at}.{key}".strip("."))
    return f"{at} was {json.dumps(a)[:120]} and is {json.dumps(b)[:120]}"
