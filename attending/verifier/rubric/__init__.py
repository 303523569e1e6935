"""Rubrics: their schema, score, generation and checks."""
