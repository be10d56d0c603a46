"""Settings: frozen dataclasses whose fields are the flags, recipes, help."""
