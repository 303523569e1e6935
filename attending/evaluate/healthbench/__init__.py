"""HealthBench: rows, scores, the grader that it is asked with, and the grader's own trial."""
