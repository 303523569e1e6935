"""The verifier: patients that ask, rubrics that say what is good, judges and rules that decide."""

from attending.verifier.rubric.schema import Criterion, Rubric
from attending.verifier.rubric.score import affine_score, score

__all__ = ["Criterion", "Rubric", "affine_score", "score"]
