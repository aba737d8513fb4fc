"""Plan → running: a batch script for Slurm, child processes here, or functions through submitit."""
