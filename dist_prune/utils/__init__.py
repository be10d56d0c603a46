"""Small helpers that know nothing of networks: whole files, tables, the console, keyed random numbers."""
