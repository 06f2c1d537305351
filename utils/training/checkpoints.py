"""Checkpoints that say themselves whether they are whole: a sealed list of their files' digests, written last."""

from __future__ import annotations

from pathlib import Path

from transformers import TrainerCallback

from utils.files import digests, record_files
from utils.sealed import read_sealed, write_sealed

LIST = "files.json"
_OF_OTHERS = "rng_state_"  # each process writes its own, and the others' may come later than the list


class SealCallback(TrainerCallback):
    """Puts the list beside what the Trainer has just saved."""

    def on_save(self, args, state, control, **_):
        if state.is_world_process_zero:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            write_sealed(folder / LIST, {"run": folder.parent.name, "files": _digests(folder)})


def find_checkpoint(folder: Path) -> str | None:
    """The last whole checkpoint in `folder`, to pass as resume_from_checkpoint; None to start from the beginning.

    One that a process died over, or is writing now, has no list yet; another's files are not those on its list, or it
    came from another run's folder. Each is told, passed over, and written anew when training comes by again.
    """
    folders = [path for path in folder.glob("checkpoint-*") if path.name.rpartition("-")[2].isdigit()]
    for checkpoint in sorted(folders, key=lambda path: int(path.name.rpartition("-")[2]), reverse=True):
        if not (checkpoint / LIST).exists():
            print(f"{checkpoint.name} has no list of its files: it was not finished, and is passed over.")
            continue
        if wrong := _what_is_wrong(checkpoint):
            print(f"{checkpoint.name} is damaged ({wrong}) and passed over.")
            continue
        return str(checkpoint)
    return None


def _what_is_wrong(checkpoint: Path) -> str | None:
    listed, found = read_sealed(checkpoint / LIST), _digests(checkpoint)
    if listed.get("run") != checkpoint.parent.name:
        return f"{LIST} is not the one that was written here"
    names = sorted(name for name in listed["files"] | found if listed["files"].get(name) != found.get(name))
    return f"{names[0]} is not what was written" if names else None


def _digests(checkpoint: Path) -> dict[str, str]:
    found = digests(record_files(checkpoint, (".",)))
    return {name: digest for name, digest in found.items() if name != LIST and not name.startswith(_OF_OTHERS)}
