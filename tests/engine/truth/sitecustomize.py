"""With this folder on PYTHONPATH an engine writes down which pages it takes to be where.

After each step in which all was told, into the file that KVSTRATA_TRUTH names: what KV events must
add up to. Python imports this file when it starts.
"""

import json
import os
from collections.abc import Iterable

from kvstrata.offload.context import Event
from kvstrata.offload.manager import TieringManager

_take_events = TieringManager.take_events


def take_events(manager: TieringManager) -> Iterable[Event]:
    """As before, and then the truth."""
    events = _take_events(manager)
    if manager.changes.more or manager._was_reset:
        return events
    (link,) = manager.links
    truth = {
        "CPU": [entry.key.hex() for entry in manager.primary if entry.ready],
        "STORAGE": [key.hex() for key in link.tier.inner._index._present],
    }
    path = os.environ["KVSTRATA_TRUTH"]
    with open(f"{path}.new", "w") as file:
        json.dump(truth, file)
    os.replace(f"{path}.new", path)
    return events


TieringManager.take_events = take_events
