"""Downloads a model from Hugging Face's hub in a process of its own, which can be ended.

The time-outs of the hub's client begin again with each byte, so it never leaves a hub that sends one now and then. The
process runs this file, which imports nothing else of jvitmoe.
"""

import contextlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

LEAST_BYTES, WINDOW_SECONDS = 2**18, 60.0  # a download that brings less in so long is ended
CHUNK = 2**16  # bytes that it writes at once, and by which its progress is seen


def run(repository: str, revision: str, wanted: Sequence[str], answer_seconds: float) -> Path:
    """Returns the folder in the hub's cache that holds the wanted files of a model, OWNER/NAME, downloaded once; those
    that it lacks are left out. Raises OSError with the cause if the hub does not answer in time or sends too little."""
    from huggingface_hub import constants, file_download

    folder = file_download.repo_folder_name(repo_id=repository, repo_type="model")
    blobs = Path(constants.HF_HUB_CACHE, folder, "blobs")
    command = [sys.executable, "-P", __file__, str(os.getpid()), repository, revision, str(answer_seconds), *wanted]
    pipes: Any = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes, start_new_session=True) as child:  # Ctrl-C is for this process alone
        try:
            said = _wait(child, blobs)
        finally:
            child.kill()
    if child.returncode:
        raise OSError(said or f"the download ended with code {child.returncode}")
    return Path(said)


def _wait(child: subprocess.Popen[str], blobs: Path) -> str:
    """Returns what the process prints. Raises TimeoutError where it brings too little."""
    seen, deadline = _bytes_in(blobs), time.monotonic() + WINDOW_SECONDS
    while True:
        try:
            return child.communicate(timeout=0.5)[0].strip()
        except subprocess.TimeoutExpired:
            if (now := _bytes_in(blobs)) >= seen + LEAST_BYTES:
                seen, deadline = now, time.monotonic() + WINDOW_SECONDS
            elif time.monotonic() > deadline:
                rate = f"{LEAST_BYTES:,} bytes in {WINDOW_SECONDS:g} s"
                raise TimeoutError(f"the hub sends less than {rate}") from None


def _bytes_in(folder: Path) -> int:
    """Returns the bytes of the files in a folder, and of their blocks: a file may have its size before its bytes."""
    total = 0
    for path in folder.glob("*"):
        with contextlib.suppress(OSError):  # renamed when it was complete
            total += path.stat().st_size + 512 * path.stat().st_blocks
    return total


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _main(parent: str, repository: str, revision: str, answer_seconds: str, *wanted: str) -> None:
    """Prints the folder, or the cause and exits with code 1."""
    threading.Thread(target=_end_with, args=(int(parent),), daemon=True).start()
    try:
        import huggingface_hub
        from huggingface_hub import constants

        constants.DOWNLOAD_CHUNK_SIZE = CHUNK
        huggingface_hub.HfApi().model_info(repository, revision=revision, timeout=float(answer_seconds))
        print(huggingface_hub.snapshot_download(repository, revision=revision, allow_patterns=list(wanted)))
    except Exception as error:  # of the hub's client, its HTTP library and the disk
        print(f"{type(error).__name__}: {error}")
        sys.exit(1)


if __name__ == "__main__":
    _main(*sys.argv[1:])
