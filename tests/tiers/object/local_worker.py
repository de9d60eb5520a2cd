"""The I/O process with a directory as the bucket: run as `local_worker.py DIRECTORY SOCKET ...`."""

import sys
from pathlib import Path

from obstore.store import LocalStore

from kvstrata.tiers.object import bucket
from kvstrata.tiers.process import worker

if __name__ == "__main__":
    directory = Path(sys.argv.pop(1))
    bucket.open_store = lambda config: LocalStore(directory)
    worker.main()
