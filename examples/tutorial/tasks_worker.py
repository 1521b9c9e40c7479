"""Run the tasks, one at a time: python tasks_worker.py [--prefetch N|unlimited]"""

import argparse
from pathlib import Path

from leveret.observe.events import Event, WorkerReady
from leveret.worker.program import run_worker


def announce(event: Event) -> None:
    if isinstance(event, WorkerReady):
        print(" [*] Waiting for messages. To exit press CTRL+C", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    # One message at a time is fair dispatch; "unlimited" shares them out blindly, as the tutorial's first chapters do.
    parser.add_argument("--prefetch", default="1")
    prefetch = parser.parse_args().prefetch
    run_worker(
        f"{Path(__file__).with_name('tasks.py')}:app",
        concurrency=1,
        prefetch="unlimited" if prefetch == "unlimited" else int(prefetch),
        listeners=[announce],
        log_level="WARNING",
    )


if __name__ == "__main__":
    main()
