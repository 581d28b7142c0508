"""Rollout engines: the same interface (records.RolloutEngine), the same records."""
