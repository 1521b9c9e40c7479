"""An application with an outbox and an inbox: orders are charged once, in the database at $SHOP."""

from __future__ import annotations

import os
import random
import signal
import sys
from pathlib import Path

import sqlalchemy
from sqlalchemy.orm import Session, sessionmaker

from leveret import App, Queue, current_task
from leveret.outbox import current_transaction

app = App(queues=[Queue("work")])
SHOP = os.environ["SHOP"].replace("postgresql://", "postgresql+psycopg://").replace("mysql://", "mysql+pymysql://")
new_session = sessionmaker(sqlalchemy.create_engine(SHOP))


@app.task(queue="work", inbox=new_session, backoff=0.1)
def charge(number: int) -> int:
    """Its effect is a row, and its runs are lines of the ledger."""
    session: Session = current_transaction()
    session.execute(sqlalchemy.text("INSERT INTO effect (number) VALUES (:number)"), {"number": number})
    with Path(os.environ["LEDGER"]).open("ab", buffering=0) as ledger:
        ledger.write(f"charged {number} {current_task().id}\n".encode())
    return number


def produce(start: int, count: int) -> None:
    """Transactions with an order and a task each; the odd ones are rolled back. It goes on where it was killed."""
    for number in range(start, start + count):
        with new_session() as session:
            if session.execute(sqlalchemy.text("SELECT 1 FROM orders WHERE number = :n"), {"n": number}).first():
                continue
            session.execute(sqlalchemy.text("INSERT INTO orders (number) VALUES (:n)"), {"n": number})
            charge.options(id=f"order-{number}").enqueue_in_sync(session, number)
            if random.random() < float(os.environ.get("DEADLY", "0")):
                os.kill(os.getpid(), signal.SIGKILL)  # before the commit
            session.rollback() if number % 2 else session.commit()


if __name__ == "__main__":
    produce(int(sys.argv[1]), int(sys.argv[2]))
