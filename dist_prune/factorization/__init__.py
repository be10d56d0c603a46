"""From statistics to a low-rank network: bases, spectra, budgets, the plan, projection."""
