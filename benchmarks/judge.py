"""How well the embedded judge agrees with constructed labels, beside two thresholds.

    python benchmarks/judge.py KQA

KQA is K-QA's .jsonl of 201 questions; the judge's base must be in the cache (`attending pull
judge`). Budget: some 4,700 pairs of 70 tokens at 1,500 tokens a second: about 4 minutes.
"""

import sys
import time
from pathlib import Path

from page import Measure, write

from attending.verifier.judge.embedded import EmbeddedJudge
from attending.verifier.judge.pairs import kqa_cases, read_kqa
from attending.verifier.judge.training import report

NOTES = """
Statements of K-QA's 60 report questions, of which nothing was trained or tuned on, each with an
answer that supports it or not **by construction**: no physician judged these pairs. *Met*: the
physician's own answer (plain), with another sentence contradicted or removed (elsewhere), or
statement and answer both turned into the opposite (negated). *Not met*: without the supporting
sentences (removed), statement or support turned into the opposite (contradicted), or the answer to
another question of the same diagnosis (sibling). The contradictions of training and report come
from the same rules (`attending/verifier/contradict.py`): other contradictions may be harder.

The two baselines are a threshold on the base's cosine and one on the share of the statement's words
in the nearest sentence; all thresholds were chosen on 40 other questions. ECE and Brier: less is
better. In brackets: 95 % intervals of 1,000 bootstrap draws of whole questions.

It leans on shared words: what an answer says in quite other words it mostly takes for absent, which
these labels hardly show. Two designs were trained; both were measured on these questions.
"""


def main() -> None:
    kqa, judge = Path(sys.argv[1]), EmbeddedJudge()
    result = report(judge.bert, judge.weights, kqa)
    subjects = ("embedded", "cosine", "word overlap")
    lines = [f"| | pairs | {' | '.join(subjects)} |", "|---|---|---|---|---|"]
    measures = []
    for name in result["embedded"]:
        count = result["pairs"].get(name.removeprefix("accuracy: "), sum(result["pairs"].values()))
        cells = [cell(result[subject].get(name)) for subject in subjects]
        lines.append(f"| {name} | {count:,} | {' | '.join(cells)} |")
        found = [(subject, result[subject].get(name)) for subject in subjects]
        measures += [Measure(name, subject, figure[:1]) for subject, figure in found if figure]
    cases = [case for case in kqa_cases(read_kqa(kqa), "report")][:100]
    start = time.perf_counter()
    judge.judge([(case.statement, " ".join(case.parts)) for case in cases])
    rate = len(cases) / (time.perf_counter() - start)
    notes = NOTES + "\n".join(["", *lines, "", f"It judges {rate:.0f} criteria a second here.", ""])
    page = write("judge", "The embedded judge", notes, measures)
    print(page.read_text("utf-8"))


def cell(figure: list[float] | None) -> str:
    return "{:.3f} ({:.3f} to {:.3f})".format(*figure) if figure else ""


if __name__ == "__main__":
    main()
