"""Compiles the Triton kernels of a configuration before a GPU sees them, with or without one: docs/gpu.md.

driver.py   a GPU that is not there: Triton compiles for it, launches do nothing
passes.py   what the steps of a configuration launch
worker.py   one of several processes that share the compiling
run.py      starts them, and collects what they compiled
choose.py   from what was compiled or measured to a table of kernels/tuning
measure.py  the same passes on a GPU, timed by the autotuners
"""
