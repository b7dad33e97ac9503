"""Stands in for verifiers >= 0.4 where it is not installed: as much of it as `tiny_tasks` and our worker use."""
