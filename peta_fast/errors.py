"""Every error a user can meet: a ValueError that says who, what was expected, what came, and what to do next."""


class PetaFastError(ValueError):
    """Base of all errors raised on purpose.

    who        the file, tensor, model or key that is at fault
    problem    what was expected and what came, one sentence
    next_step  what the user can do about it (optional)
    """

    exit_code = 2

    def __init__(self, who: str, problem: str, next_step: str = ""):
        self.who, self.problem, self.next_step = who, problem, next_step
        super().__init__(f"{who}: {problem}" + (f"\n{next_step}" if next_step else ""))


class RecipeError(PetaFastError):
    """A recipe, parameter or keyword that cannot be understood; raised once with all faults of a recipe."""

    exit_code = 2


class CheckpointError(PetaFastError):
    """A checkpoint file that is missing, corrupt, or holds values that must not be merged (NaN, inf)."""

    exit_code = 3


class CompatibilityError(PetaFastError):
    """Checkpoints that are sound but do not fit together: names, shapes or dtypes differ."""

    exit_code = 4


class ResourceError(PetaFastError):
    """Too little disk or memory, or an output that cannot be written."""

    exit_code = 5
