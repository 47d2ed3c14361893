"""Pipelines: what a job does from reading to publishing, given what bootstrap built."""
