"""The files of a run: what it was made with, what was asked, answered, judged, spent.

`plan.json` holds the settings; a run that goes on with others is refused, not mixed. Answers and
grades are lines that are there as soon as they are known; where an answer was judged twice, the
last line counts, and a grade counts only for the text that it was given for.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import Any

from attending import logs
from attending.artifact import alone, disk_has_room, without_folders, write_json
from attending.errors import CheckpointError, ConfigError, UsageError
from attending.evaluate.sample import Answer, Grade, Key, Sample, Task
from attending.verifier.rubric.schema import read_lines

PLAN, SPENT = "plan.json", "spent.json"


class Store:
    """One folder."""

    def __init__(self, folder: Path, *, resume: bool) -> None:
        """UsageError where it holds a run already and none is to be resumed."""
        if folder.exists() and not folder.is_dir():
            raise UsageError(f"{folder.name} is a file: give --out a folder.")
        has_plan = (folder / PLAN).exists()
        has_run = any(file.stat().st_size for file in folder.glob("*/*.answers.jsonl"))
        if has_run and has_plan and not resume:
            raise UsageError(
                f"{folder} holds a run: go on with it by --resume, or give another --out."
            )
        if has_run and not has_plan:
            raise UsageError(
                f"{folder} holds answers, but no {PLAN} that says what was asked: give another "
                "--out."
            )
        if resume and not has_plan:
            raise UsageError(f"there is no run in {folder} to go on with: leave --resume out.")
        if not has_run:
            (folder / PLAN).unlink(missing_ok=True)  # of a start that failed
        self.folder = folder
        (folder / "examples").mkdir(parents=True, exist_ok=True)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """While one process writes, another one is a UsageError: answers would be paid twice."""
        with alone(self.folder, "give another --out"):
            yield

    def hold(self, key: str, value: Any) -> None:
        """Keep what the run is made with; UsageError where it was begun with something else."""
        plan = self._object(PLAN)
        value = json.loads(json.dumps(without_folders(value)))
        if plan.setdefault(key, value) != value:
            raise UsageError(
                f"{self.folder.name} was begun with another {key}: {_differing(plan[key], value)}. "
                "Give another --out, or what it was begun with."
            )
        self._replace(PLAN, plan)

    def spent(self) -> dict[str, float]:
        """What earlier parts of the run spent, by unit."""
        return self._object(SPENT)

    def keep_spent(self, sums: Mapping[str, float | None]) -> None:
        """Of all parts so far."""
        self._replace(SPENT, dict(sums))

    def write_examples(self, task: Task) -> None:
        """What is asked, for the page."""
        rows = []
        for one in task.examples:
            reference = {"reference": one.data["reference"]} if "reference" in one.data else {}
            rows.append({"id": one.id, "messages": one.messages, "tags": one.tags, **reference})
        self._write_all(self.folder / "examples" / f"{task.name}.jsonl", task, rows)

    def answers(self, model: str, task: Task) -> dict[Key, Answer]:
        """Those to the task's examples."""
        wanted = {one.id for one in task.examples}
        found = [read_answer(row, where) for where, row in self._rows(model, task, "answers")]
        return {one.key: one for one in found if one.id in wanted}

    def grades(self, model: str, task: Task, answers: Mapping[Key, Answer]) -> dict[Key, Grade]:
        """Of these answers; the last one of each."""
        found: dict[Key, Grade] = {}
        for where, row in self._rows(model, task, "grades"):
            key, digest, grade = read_grade(row, where)
            if key in answers and digest == _digest(answers[key]):
                found[key] = grade
        return found

    def write_grades(self, model: str, task: Task, samples: Iterable[Sample]) -> None:
        """All at once: of a task that needs no judge."""
        rows = (_graded(one.answer, one.grade) for one in samples)
        self._write_all(self._file(model, task, "grades"), task, rows)

    @contextmanager
    def adding_answers(self, model: str, task: Task) -> Iterator[Callable[[Answer], None]]:
        """What appends one."""
        with self._adding(model, task, "answers") as add:
            yield lambda answer: add(asdict(answer))

    @contextmanager
    def adding_grades(self, model: str, task: Task) -> Iterator[Callable[[Answer, Grade], None]]:
        """What appends one."""
        with self._adding(model, task, "grades") as add:
            yield lambda answer, grade: add(_graded(answer, grade))

    def _file(self, model: str, task: Task, kind: str) -> Path:
        return self.folder / model / f"{task.name}.{kind}.jsonl"

    def _rows(self, model: str, task: Task, kind: str) -> Iterator[tuple[str, dict[str, Any]]]:
        path = self._file(model, task, kind)
        logs.cut(path)  # of a last line that a crash left half-written
        yield from read_lines(path) if path.exists() else ()

    @contextmanager
    def _adding(
        self, model: str, task: Task, kind: str
    ) -> Iterator[Callable[[Mapping[str, Any]], None]]:
        path = self._file(model, task, kind)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab", buffering=0) as file:  # nothing is left for closing to write

            def add(row: Mapping[str, Any]) -> None:
                with disk_has_room(path):
                    file.write(_line(row, task))

            yield add

    def _write_all(self, path: Path, task: Task, rows: Iterable[Mapping[str, Any]]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_suffix(".tmp")
        with disk_has_room(path):
            draft.write_bytes(b"".join(_line(row, task) for row in rows))
            draft.replace(path)

    def _object(self, name: str) -> dict[str, Any]:
        file = self.folder / name
        try:
            found = json.loads(file.read_text("utf-8")) if file.is_file() else {}
        except ValueError as error:
            raise CheckpointError(
                f"{name} of {self.folder.name} is damaged ({error}): give another --out."
            ) from None
        return dict(found)

    def _replace(self, name: str, values: Mapping[str, Any]) -> None:
        file, draft = self.folder / name, self.folder / f"{name}.tmp"
        with disk_has_room(file):
            write_json(draft, values)
            draft.replace(file)


def read_answer(row: dict[str, Any], where: str) -> Answer:
    """Of a line; ConfigError where it is not of this version."""
    row.pop("canary", None)
    try:
        return Answer(**row)
    except TypeError as error:
        raise ConfigError(f"{where} is no answer of this version ({error}).") from None


def read_grade(row: dict[str, Any], where: str) -> tuple[Key, str, Grade]:
    """Of a line: whose it is, the digest of the text that it is for, and the grade."""
    row.pop("canary", None)
    try:
        key, digest = (row.pop("id"), row.pop("repeat")), row.pop("answer_sha256")
        return key, digest, Grade(**row)
    except (KeyError, TypeError) as error:
        raise ConfigError(f"{where} is no grade of this version ({error}).") from None


def _graded(answer: Answer, grade: Grade) -> dict[str, Any]:
    key = {"id": answer.id, "repeat": answer.repeat, "answer_sha256": _digest(answer)}
    return key | asdict(grade)


def _digest(answer: Answer) -> str:
    return sha256(answer.text.encode("utf-8", "surrogatepass")).hexdigest()


def _line(row: Mapping[str, Any], task: Task) -> bytes:
    """With the canary of the data, so that the file can be kept out of training."""
    whole = {**row, "canary": task.canary} if task.canary else row
    try:
        return (json.dumps(whole, ensure_ascii=False) + "\n").encode()
    except UnicodeEncodeError:  # half of a pair of surrogates, as some models write
        return (json.dumps(whole) + "\n").encode()


def _differing(a: Any, b: Any, at: str = "") -> str:
    """Where two plans differ first, with both values."""
    if isinstance(a, dict) and isinstance(b, dict):
        key = next(key for key in {**a, **b} if a.get(key) != b.get(key))
        return _differing(a.get(key), b.get(key), f"{at}.{key}".strip("."))
    return f"{at} was {json.dumps(a)[:120]} and is {json.dumps(b)[:120]}"
