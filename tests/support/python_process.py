"""Start Python programs in processes of their own that need not load torch and diffusers again.

They are forked from a process that has loaded those two and done nothing else, so a program sees
what it would see in a fresh interpreter, 8 s of processor time earlier.
"""

import multiprocessing
import os
import runpy
import sys
from multiprocessing.process import BaseProcess
from pathlib import Path

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(["torch", "diffusers.models.autoencoders.autoencoder_kl"])


def start_python(*words: str, folder: Path) -> BaseProcess:
    """Start `python WORDS`, where WORDS begin with -m and a module or with a file.

    Its output goes to the files stdout and stderr in `folder`, which is where it runs.
    """
    process = _SERVER.Process(target=_run, args=(words, folder))
    process.start()
    return process


def _run(words: tuple[str, ...], folder: Path) -> None:
    os.chdir(folder)
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        file = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, descriptor)
        os.close(file)
    if words[0] == "-m":
        sys.argv = list(words[1:])
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = list(words)
        sys.path.insert(0, str(Path(words[0]).parent))
        runpy.run_path(words[0], run_name="__main__")
