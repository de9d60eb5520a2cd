"""The I/O process, but on a machine that stands still for seconds nobody takes books for hung."""

from kvstrata.tiers.fs.budget import ledger
from kvstrata.tiers.process import worker

if __name__ == "__main__":
    ledger._LOCK_WITHIN_S = 60.0
    worker.main()
