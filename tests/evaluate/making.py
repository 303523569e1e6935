"""A run's folder made by a script: invented questions and criteria, scores drawn at random."""

import json
import random
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

CANARY = "canary:00000000-test-0000-0000-000000000000"
AXES = (
    "accuracy",
    "completeness",
    "context_awareness",
    "communication_quality",
    "instruction_following",
)
THEMES = ("hedging", "communication", "emergency_referrals", "context_seeking", "global_health")
COMPLAINTS = ("a dry cough", "a sore knee", "trouble sleeping", "an itchy rash", "a mild headache")
SINCE = ("since yesterday", "for three days", "for two weeks", "since a long flight")
CRITERIA = (
    ("Asks how long the complaint has lasted.", 5, "axis:context_awareness"),
    ("Names a sign that needs care the same day.", 7, "axis:completeness"),
    ("States a dose without asking for other medicines.", -5, "axis:accuracy"),
    ("Uses words that a lay person understands.", 3, "axis:communication_quality"),
    ("Says that antibiotics are always needed.", -8, "axis:accuracy"),
    ("Answers in at most five sentences.", 2, "axis:instruction_following"),
)
PATH = {
    "source": "default",
    "weights": "Q4_1 as float32",
    "activations": "float32",
    "kv": "float32",
    "draft": "none",
    "sha256": "ab" * 32,
}
JUDGE: dict[str, Any] = {
    "name": "a-judge",
    "version": "a-judge-2026-01-01",
    "template": "attending/grader",
    "template_sha256": "cd" * 32,
    "caution": "It misses what an answer says in quite other words.",
    "agreement": {
        "metric": "macro-F1",
        "value": 0.71,
        "interval": [0.69, 0.73],
        "n": 29511,
        "against": "physicians",
    },
}


def write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text("".join(lines), encoding="utf-8")


def read_report(folder: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((folder / "report.json").read_text("utf-8"))
    return report


def row(model: str, task: str, score: float, **more: Any) -> dict[str, Any]:
    """A row of report.json."""
    values: dict[str, Any] = {
        "model": model,
        "task": task,
        "metric": "accuracy",
        "score": score,
        "interval": [round(score - 0.03, 3), round(score + 0.03, 3)],
        "n": 1000,
        "n_answers": 1000,
        "unscored": 0.0,
        "bounds": [score, score],
        "unclipped": score,
        "bootstrap_std": 0.015,
        "chance": None,
        "says": "",
        "is_loss": False,
        "parts": {},
        "more": {},
        "judge": None,
        "contamination": None,
        "input_tokens": 12345,
        "output_tokens": 678,
        "path": PATH,
        "data_sha256": "ef" * 32,
    }
    return values | more


def pair(task: str, a: str, b: str, difference: float, half: float = 0.02) -> dict[str, Any]:
    ends = [round(difference - half, 3), round(difference + half, 3)]
    return {
        "task": task,
        "a": a,
        "b": b,
        "difference": difference,
        "interval": ends,
        "n": 1000,
    }


def make_run(
    folder: Path,
    models: Sequence[str] = ("default", "other"),
    *,
    suite: str = "medical",
    examples: int = 12,
    criteria: int = 6,
    repeats: int = 1,
    seed: int = 0,
    words: int = 30,
    **report: Any,
) -> Path:
    """A folder as a run leaves it: a judged task, questions with options, and bits per byte."""
    draw = random.Random(seed)
    judged = [_conversation(draw, number) for number in range(examples)]
    asked = [_question(draw, number) for number in range(examples // 2)]
    write_lines(folder / "examples/healthbench.jsonl", judged)
    write_lines(folder / "examples/medqa.jsonl", asked)
    for place, model in enumerate(models):
        answers, grades = [], []
        for one in judged:
            for repeat in range(repeats):
                answer, grade = _judged(draw, one, repeat, criteria, words, 0.4 + 0.2 * place)
                answers.append(answer)
                grades.append(grade)
        write_lines(folder / model / "healthbench.answers.jsonl", answers)
        write_lines(folder / model / "healthbench.grades.jsonl", grades)
        chosen = [_chosen(draw, one) for one in asked]
        write_lines(folder / model / "medqa.answers.jsonl", [answer for answer, _ in chosen])
        write_lines(folder / model / "medqa.grades.jsonl", [grade for _, grade in chosen])
    rows = [_row(draw, model, task, repeats) for task in TASKS for model in models]
    scores = {(one["task"], one["model"]): one["score"] for one in rows}
    pairs = [
        pair(task, models[0], other, round(scores[task, other] - scores[task, models[0]], 3))
        for other in models[1:]
        for task in TASKS
    ]
    values = {
        "suite": suite,
        "overall": 0.31,
        "seed": 0,
        "resamples": 1000,
        "created": "2026-11-26",
        "command": f"attending eval {suite} {' '.join(models)}",
        "commit": "1234567890ab",
        "canary": CANARY,
        "warnings": ["default is a demonstration model.", "A sample of 12 of 5,000 examples."],
        "judge": JUDGE,
        "models": [{"name": name, "folder": name, "path": PATH} for name in models],
        "rows": rows,
        "pairs": pairs,
        "spent": {"tokens": 1234.0, "seconds": 5.5, "cost": 1.25},
    }
    (folder / "report.json").write_text(json.dumps(values | report), encoding="utf-8")
    return folder


TASKS = ("healthbench", "medqa", "text")


def _row(draw: random.Random, model: str, task: str, repeats: int) -> dict[str, Any]:
    score = round(draw.uniform(0.2, 0.6), 3)
    if task == "medqa":
        parts = {f"subject:{name}": _part(draw) for name in ("anatomy", "virology")}
        return row(model, task, 0.262, chance=0.25, says="at chance", parts=parts)
    if task == "text":
        bits = {"metric": "bits per byte", "is_loss": True}
        return row(model, task, round(1 + score, 3), **bits)
    names = [f"axis:{name}" for name in AXES] + [f"theme:{name}" for name in THEMES]
    names += ["level:cluster", "level:example"]
    more = {"worst_at_k": {str(k): round(score * 0.9**k, 3) for k in range(1, repeats + 1)}}
    judged = {"judge": "a-judge", "metric": "points met", "n_answers": 1000 * repeats}
    unsure = {"unscored": 0.021, "bounds": [round(score - 0.01, 3), round(score + 0.01, 3)]}
    parts = {name: _part(draw) for name in names}
    return row(model, task, score, parts=parts, more=more, **judged, **unsure)


def _part(draw: random.Random) -> dict[str, Any]:
    score = round(draw.uniform(0.1, 0.9), 3)
    return {"score": score, "interval": [max(score - 0.1, 0), min(score + 0.1, 1)], "n": 250}


def _conversation(draw: random.Random, number: int) -> dict[str, Any]:
    complaint, since = draw.choice(COMPLAINTS), draw.choice(SINCE)
    messages = [
        {"role": "user", "content": f"I have had {complaint} {since}."},
        {"role": "assistant", "content": "I am sorry to hear that. What worries you most?"},
        {"role": "user", "content": f"Is {complaint} dangerous, and what can I take? ({number})"},
    ]
    return {"id": f"h-{number}", "messages": messages, "tags": [f"theme:{draw.choice(THEMES)}"]}


def _judged(
    draw: random.Random, example: Mapping[str, Any], repeat: int, count: int, words: int, p: float
) -> tuple[dict[str, Any], dict[str, Any]]:
    text = "<think>They ask about danger.</think>In most cases this settles by itself. " + " ".join(
        draw.choice(("Rest", "drink enough", "see a doctor", "if it gets worse", "today"))
        for _ in range(words)
    )
    key = {"id": example["id"], "repeat": repeat}
    verdicts: list[dict[str, Any]] = []
    for place in range(count):
        criterion, points, _ = CRITERIA[place % len(CRITERIA)]
        met = None if draw.random() < 0.01 else draw.random() < p
        criterion += f" ({place // len(CRITERIA) + 1})" if place >= len(CRITERIA) else ""
        why = (
            f"The answer {'does' if met else 'does not'} do so in its {draw.randint(1, 9)}th part."
        )
        verdicts.append({"criterion": criterion, "points": points, "met": met, "explanation": why})
    is_known = all(one["met"] is not None for one in verdicts)
    most = sum(one["points"] for one in verdicts if one["points"] > 0)
    score = sum(one["points"] for one in verdicts if one["met"]) / most if is_known else None
    grade = {"score": score, "bounds": None if is_known else [0.1, 0.4], "verdicts": verdicts}
    answer = {"text": text, "finish_reason": "stop", "input_tokens": 80, "output_tokens": 60}
    return key | answer, key | grade | {"reason": "", "parts": {}, "weight": 1.0}


def _question(draw: random.Random, number: int) -> dict[str, Any]:
    content = f"Which of these best eases {draw.choice(COMPLAINTS)}? (A) Rest (B) Haste ({number})"
    messages = [{"role": "user", "content": content}]
    tags = [f"subject:{draw.choice(('anatomy', 'virology'))}"]
    return {"id": f"q/{number}", "messages": messages, "tags": tags, "reference": "A"}


def _chosen(
    draw: random.Random, example: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    key = {"id": example["id"], "repeat": 0}
    likely = {"A": -draw.random(), "B": -draw.random()}
    choice = max(likely, key=lambda option: likely[option])
    reason = f"{choice} is the likeliest; A is right."
    grade = {"score": float(choice == "A"), "reason": reason, "verdicts": []}
    return key | {"text": "", "logprobs": likely}, key | grade
