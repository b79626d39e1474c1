"""What a user calls a detector: a folder, an id of the Hub, or a new one. A slip of the pen is told at once."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import huggingface_hub
from huggingface_hub import constants
from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

CONFIG = "config.json"


def near(word: str, known: Iterable[str], most: int = 3) -> str:
    """ "; did you mean 'x' or 'y'?" with the known names that are spelt nearly like `word`, or nothing."""
    lowered = {name.lower(): name for name in known}
    longer = sorted((name for name in lowered if name.startswith(word.lower())), key=len) if len(word) > 2 else []
    alike = difflib.get_close_matches(word.lower(), lowered, most, cutoff=0.6)
    names = [lowered[name] for name in dict.fromkeys([*longer, *alike])][:most]
    return f"; did you mean {' or '.join(map(repr, names))}?" if names else ""


def check_source(source: str | os.PathLike[str], revision: str | None = None, new: Sequence[str] = ()) -> None:
    """Find out, before anything is loaded, whether there is a detector at `source`.

    Args:
        source: Folder or Hub id.
        revision: Branch, tag or commit on the Hub.
        new: Architectures of new detectors, to which the word may come near too.

    Raises:
        FileNotFoundError: There is no such folder, no model in it, or no such model on the Hub.
        OSError: The Hub doesn't answer, and the model isn't in its cache.
    """
    text = os.fspath(source)
    path = Path(text)
    if path.is_dir():
        _check_folder(path)
    elif path.exists():
        raise FileNotFoundError(f"{text} is a file. Give the folder of the model, such as {path.parent}.")
    elif _is_path(text):
        names = [os.fspath(path.parent / entry.name) for entry in _folders(path.parent)]
        hint = near(text, [*names, *(f"{name}:resnet18" for name in new), *new])
        raise FileNotFoundError(
            f"There is no folder {text!r}{hint or '.'} Needed is a folder with {CONFIG}, an id of the Hub as "
            f"OWNER/NAME{', or a new detector such as gfl:resnet18' if new else ''}."
        )
    else:
        _check_hub(text, revision)


def _check_folder(path: Path) -> None:
    if (path / CONFIG).is_file():
        return
    below = [entry.name for entry in _folders(path) if (entry / CONFIG).is_file()]
    seen = f"; models lie in its folders {', '.join(sorted(below)[:8])}: name one of them" if below else ""
    raise FileNotFoundError(f"The folder {path} holds no model, it has no {CONFIG}{seen}.")


def _is_path(text: str) -> bool:
    """Whether a word that names nothing here was meant as a path: ids of the Hub are OWNER/NAME."""
    parts = Path(text).parts
    return text.startswith((".", "~", os.sep)) or "\\" in text or len(parts) != 2 or Path(parts[0]).exists()


def _folders(parent: Path) -> list[Path]:
    return [entry for entry in parent.iterdir() if entry.is_dir()] if parent.is_dir() else []


@contextmanager
def asking_the_hub(what: str, way_out: str) -> Iterator[None]:
    """Inside of it, whatever the Hub's client raises becomes one sentence.

    Args:
        what: What was asked for, and of what option, as the beginning of the sentence.
        way_out: What to do without it, as sentences.

    Raises:
        OSError: The Hub doesn't answer, or refuses.
    """
    try:
        yield
    except Exception as error:  # of the Hub, of its client of the day, of the network: each has classes of its own
        raise OSError(
            f"{what}; the Hub's client says {type(error).__name__}: {first_line(error)}. {way_out}"
        ) from error


def first_line(error: BaseException) -> str:
    """What an error says, without what follows in further lines."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "").rstrip(".")


def _check_hub(name: str, revision: str | None) -> None:
    try:
        if huggingface_hub.try_to_load_from_cache(name, CONFIG, revision=revision) is not None:
            return  # from_pretrained looks into the cache, without retries
        if constants.HF_HUB_OFFLINE:
            raise FileNotFoundError(
                f"{name!r} is no folder here and not in the cache of the Hub ({constants.HF_HUB_CACHE}), and "
                "HF_HUB_OFFLINE=1 keeps the Hub from being asked. Correct the name, or fetch it where there is a "
                f"network: hf download {name}."
            )
        found = huggingface_hub.file_exists(name, CONFIG, revision=revision)
        missing = f"has no {CONFIG}" if not found else ""
    except FileNotFoundError:
        raise
    except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError, GatedRepoError) as error:
        missing = f"can't be read ({first_line(error)})"
    except Exception as error:  # whatever the client of the day raises without a network
        raise OSError(
            f"{name!r} is no folder here, and the Hub doesn't answer ({type(error).__name__}). Correct the folder's "
            "name, or try again with a network."
        ) from error
    if missing or not found:
        raise FileNotFoundError(
            f"{name!r} is no folder here, and there is no such model on the Hub, or it {missing or 'is private'}. "
            "Correct the name; for a private model run `hf auth login` first."
        )
