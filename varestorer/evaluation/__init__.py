"""Evaluation: protocols, the evaluator, its records, the published tables and the report of a run."""
