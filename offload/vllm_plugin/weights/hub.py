"""SHA-256 of a file that Hugging Face's cache knows already: it is the blob's name.

`<cache>/models--org--name/snapshots/<commit>/<file>` is a link to `../../blobs/<etag>`, and the
etag of a large file (LFS, Xet) is its SHA-256, of a small one its 40-digit git hash
(https://huggingface.co/docs/huggingface_hub/guides/manage-cache).
"""

from __future__ import annotations

import os
import re
import stat

_SHA256 = re.compile(r"[0-9a-f]{64}")


def hub_digest(path: str) -> str | None:
    """SHA-256 in hex of the file behind a link into the cache; None where it is not known.

    The name is believed only if the blob has not been touched since the link was made, which is
    the last thing that a download does: later writes into the blob show in its change time, and
    through copies that keep times in its modification time.

    Raises:
        OSError: the file cannot be asked.
    """
    link = os.lstat(path)
    if not stat.S_ISLNK(link.st_mode):
        return None
    real = os.path.realpath(path)
    folder, name = os.path.split(real)
    repository, blobs = os.path.split(folder)
    if blobs != "blobs" or not os.path.basename(repository).startswith("models--"):
        return None
    blob = os.stat(real)
    # An archive may keep whole seconds only: within one nothing can be told.
    coarse = link.st_mtime_ns % 1_000_000_000 == 0 and blob.st_mtime_ns == link.st_mtime_ns
    later = blob.st_ctime_ns > link.st_ctime_ns or blob.st_mtime_ns > link.st_mtime_ns
    touched = later or coarse
    return name if _SHA256.fullmatch(name) and not touched else None
