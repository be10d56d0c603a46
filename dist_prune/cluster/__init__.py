"""Many runs: sweeps, SLURM arrays, their tables and pages."""
