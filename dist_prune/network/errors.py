"""The error of networks and weights that cannot be used."""


class ModelError(ValueError):
    """An architecture or a checkpoint that cannot be used; the message says what to do."""
