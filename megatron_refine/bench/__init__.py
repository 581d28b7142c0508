"""Benchmarks. All kinds of a benchmark are taken in turn in one process, so that a drifting machine slows all alike.

step.py     a training step of each kind, beside the official scheme;  official.py  that scheme, written out
length.py   the cost of a step over the length of its sequences
rollout.py  rollouts from forked states and from prefilled prefixes;  kernels.py  kernels in chunks and step by step
baseline.py ratios as JSON, and today's held to them
sync.py     weights to SGLang servers;  data.py  text to batches;  timing.py  rounds, medians, bytes of the graph
"""
