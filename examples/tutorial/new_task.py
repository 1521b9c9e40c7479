"""Schedule a task from the command line: python new_task.py First message."""

import asyncio
import sys

from tasks import app, work


async def main() -> None:
    message = " ".join(sys.argv[1:]) or "Hello World!"
    async with app:
        await work.enqueue(message.encode())
    print(f" [x] Sent {message!r}")


if __name__ == "__main__":
    asyncio.run(main())
