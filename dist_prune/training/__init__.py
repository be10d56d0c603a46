"""Training in lockstep, evaluation, and what each site loses alone."""
