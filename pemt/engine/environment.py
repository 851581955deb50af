"""A command's environment: a working folder full of modules, closed or narrow streams, a home it cannot write.

Nothing but `os` and `sys` is imported with it: a file of the user's may have any other module's name.
"""

from __future__ import annotations

import os
import sys

READABLE = (
    "HF_HUB_CACHE",
    "TORCH_EXTENSIONS_DIR",
)  # caches that are of use where they can only be read


def leave_working_folder() -> None:
    """Take the working folder off the search path for modules: nothing of the user's own is ever imported.

    `python -m pemt`, which is what `accelerate launch -m pemt` starts, puts it first, and an `evaluate.py` there would
    stand for the library. It stays, as the last one, where pemt itself lies in it or PYTHONPATH names it.
    """
    try:
        here = os.path.realpath(os.getcwd())
    except OSError:  # it has been deleted
        return
    import site

    libraries = (*site.getsitepackages(), site.getusersitepackages(), os.path.dirname(os.__file__))
    if here in map(os.path.realpath, libraries):
        return
    others = [entry for entry in sys.path if os.path.realpath(entry or ".") != here]
    named = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    wanted = {os.path.realpath(entry) for entry in named if entry not in ("", ".")}
    # the folder that the package lies in
    wanted.add(os.path.realpath(os.path.join(os.path.dirname(__file__), "..", "..")))
    kept = [here] if here in wanted and len(others) < len(sys.path) else []
    sys.path[:] = [*others, *kept]


def open_streams() -> None:
    """Give a process that has no stdin, stdout or stderr (`>&-`) empty ones, and let every text be printed.

    A descriptor that is free would be the next file's, and what a library prints would end up in it. A character that a
    stream's encoding lacks (Latin-1 has no Japanese) is written as JSON escapes it, so that lines of JSON stay JSON.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            null = os.open(os.devnull, os.O_RDWR)
            if null != descriptor:
                os.dup2(null, descriptor)
                os.close(null)
            os.set_inheritable(descriptor, True)
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115 as long as the process
    import codecs

    codecs.register_error("pemt.escape", _escaped)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # pytest's and notebooks' own need it not
            stream.reconfigure(errors="pemt.escape")


def _escaped(error: UnicodeError) -> tuple[str, int]:
    import json

    if not isinstance(error, UnicodeEncodeError):
        raise error
    return json.dumps(error.object[error.start : error.end])[1:-1], error.end


def use_writable_caches() -> None:
    """Send libraries' caches that cannot be written, as in a read-only home, to a temporary folder; reported once.

    Before these libraries are imported: they read the variables then. A cache of downloads or of compiled kernels that
    is there already stays, since it can be read.
    """
    moved = []
    for variable, folder in _caches().items():
        if can_be_written(folder) or (variable in READABLE and os.path.isdir(folder)):
            continue
        os.environ[variable] = os.path.join(temporary_folder(), variable.lower())
        moved.append(folder)
    if moved and os.environ.get("RANK", "0") == "0":
        print(
            f"pemt: {moved[0]} cannot be written (nor {len(moved) - 1} other caches): they go to {temporary_folder()}, "
            "where nothing may be kept; set HF_HOME, or HOME, to a folder that can be written",
            file=sys.stderr,
            flush=True,
        )


def _caches() -> dict[str, str]:
    """By its variable, each cache's folder as the library would choose it."""
    given = os.environ.get
    home = os.path.expanduser("~")
    cache = given("XDG_CACHE_HOME") or os.path.join(home, ".cache")
    settings = given("XDG_CONFIG_HOME") or os.path.join(home, ".config")
    huggingface = given("HF_HOME") or os.path.join(cache, "huggingface")
    hub = given("HUGGINGFACE_HUB_CACHE") or os.path.join(huggingface, "hub")
    folders = {
        "HF_DATASETS_CACHE": os.path.join(huggingface, "datasets"),
        "HF_HUB_CACHE": hub,
        "HF_EVALUATE_CACHE": os.path.join(huggingface, "evaluate"),
        "HF_METRICS_CACHE": os.path.join(huggingface, "metrics"),
        "HF_MODULES_CACHE": os.path.join(huggingface, "modules"),
        "HF_XET_CACHE": os.path.join(huggingface, "xet"),
        "TORCH_EXTENSIONS_DIR": os.path.join(cache, "torch_extensions"),
        "TRITON_CACHE_DIR": os.path.join(home, ".triton", "cache"),
        "MPLCONFIGDIR": os.path.join(settings, "matplotlib"),
    }
    return {name: os.path.expanduser(given(name) or folder) for name, folder in folders.items()}


def can_be_written(folder: str) -> bool:
    """Whether files can be made in a folder, or it itself can; nothing is made to find out."""
    if folder.startswith("~"):  # no home is known
        return False
    folder = os.path.abspath(folder)
    while not os.path.lexists(folder):
        folder = os.path.dirname(folder)
    return os.path.isdir(folder) and os.access(folder, os.W_OK | os.X_OK)


def own_cache() -> str:
    """Where `pemt` keeps what it makes itself, `~/.cache/pemt`, or a temporary folder where there can be none.

    Raises:
        PermissionError: as `temporary_folder`.
    """
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.join("~", ".cache")
    folder = os.path.join(os.path.expanduser(cache), "pemt")
    return folder if can_be_written(folder) else os.path.join(temporary_folder(), "cache")


def temporary_folder() -> str:
    """A folder of this user's own for what may be lost, the same for all processes of this machine.

    Raises:
        PermissionError: somebody else has made it, who could put files there that would be run.
    """
    import stat
    import tempfile

    folder = os.path.join(tempfile.gettempdir(), f"pemt-{os.getuid()}")
    os.makedirs(folder, mode=0o700, exist_ok=True)
    found = os.lstat(folder)
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise PermissionError(
            f"{folder} is not this user's own: delete it, or set TMPDIR to another folder"
        )
    return folder
