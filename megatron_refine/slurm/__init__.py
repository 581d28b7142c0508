"""Runs as SLURM jobs: the script of a job, its site, sweeps and chains. Nothing here imports torch."""
