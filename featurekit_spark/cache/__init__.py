"""The cache: its protocol and rows below the evaluator, its implementations above the controller (ADR 4)."""
