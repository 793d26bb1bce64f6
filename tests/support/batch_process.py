"""A process that runs batches of a store, line by line, and says each line that it has committed.

It takes every batch that nobody runs, and ends when there is none: `batch_process.py FOLDER LEASE`.
"""

import os
import sys
import time
from pathlib import Path

from saqqara.cluster.batch_store.inputs import check_input, read_input
from saqqara.cluster.batch_store.leases import Lease, LeaseLostError
from saqqara.cluster.batch_store.outputs import finish_batch, record
from saqqara.cluster.batch_store.progress import LineResult
from saqqara.cluster.batch_store.store import Store
from saqqara.configs.schema import BatchLimits

IDLE_SECONDS = 0.02


def run(store: Store, lease: Lease) -> None:
    """Bring a batch to its end."""
    batch, progress = lease.batch, store.progress
    with store.files.open(store.files.get(batch.owner, batch.input_file_id)) as file:
        if batch.status == "validating":
            num_lines, errors = check_input(file, batch.endpoint, store.limits)
            assert not errors
            progress.begin(lease, num_lines)
        file.seek(0)
        done = progress.done_lines(batch.id)
        for line in read_input(file, store.limits):
            if line.number in done:
                continue
            progress.start(lease, [line.number])
            data = record(batch.id, line.number, line.custom_id, {"by": lease.holder}, None)
            progress.commit(lease, [LineResult(line.number, data, is_error=False)])
            print(line.custom_id, flush=True)
    finish_batch(lease, progress, store.files, store.limits)


def main(folder: str, lease_seconds: str) -> None:
    """Run what there is."""
    store = Store(Path(folder), BatchLimits(lease_seconds=float(lease_seconds)))
    holder = f"process-{os.getpid()}"
    while store.leases.num_active():
        lease = store.leases.claim(holder, 1)
        if lease is None:
            time.sleep(IDLE_SECONDS)
            continue
        try:
            run(store, lease)
        except LeaseLostError:
            print("lost", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
