"""What can go wrong for a user, one type per kind; each message is one sentence: found, expected, what to do."""


class UserError(Exception):
    """A mistake or a lack that the user can mend.

    A notebook shows its sentence, one printable line, the middle of a long one left out, and no stack.
    """

    def __init__(self, message: object = ""):
        text = str(message)
        if not text.isprintable():
            text = " ".join(text.split())
            text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
        super().__init__(text if len(text) <= 1000 else f"{text[:660]} … {text[-340:]}")

    def _render_traceback_(self) -> list[str]:
        """IPython's hook for exceptions that draw themselves."""
        return [f"{type(self).__name__}: {self}"]


class ConfigError(UserError):
    """An unknown profile or key, a wrong type, or a value out of range."""


class DataError(UserError):
    """A data file that is missing, is not what its name says, or does not hold what is asked of it."""


class RunDirError(UserError):
    """A run directory of another profile, unwritable or changed from outside, or a stage out of turn."""


class HardwareError(UserError):
    """No GPU where the profile needs one, too little disk or memory, or a package that is not the pinned one."""


class OutOfMemory(UserError):
    """One question, row or update does not fit into memory: another session of the same machine changes nothing."""


class ModelError(UserError):
    """A model or tokenizer that cannot be loaded, or that corrupts text."""


class TrainingError(UserError):
    """A training run that went wrong: a loss that is not finite, a mask that is not the formatted one."""


class ServiceError(UserError):
    """Something that Kaggle or the Hugging Face Hub refuses, or that must not be sent there."""


class InfrastructureError(UserError):
    """A service that could not be reached or did not answer in a way that says anything about the run."""


class SessionOver(UserError):
    """No failure: the session's time is up, what was done is saved, and the next session resumes from there."""


class Interrupted(UserError):
    """No failure: the run was asked to stop (Ctrl-C, SIGTERM), what was done is saved, and the same command resumes."""


def first_line(error: BaseException) -> str:
    """The first line of an exception's text, for a sentence; its type where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]


def last_line(output: str, nothing: str = "no message") -> str:
    """The last line of a program's output that is not empty, for a sentence; `nothing` where there is none."""
    return (output.strip().splitlines() or [nothing])[-1].strip()
