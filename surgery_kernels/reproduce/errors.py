"""What is wrong with what a run was given."""


class InputError(ValueError):
    """In one sentence, for the one who typed the command."""
