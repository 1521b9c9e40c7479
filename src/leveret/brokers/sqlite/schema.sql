-- Leveret's tables. One file holds many queues; every process that uses it opens it by itself.
-- A task is in exactly one state; the partial indexes keep a claim as cheap at a million rows as at a thousand.

CREATE TABLE queue (
    id          INTEGER PRIMARY KEY,
    name        TEXT NOT NULL UNIQUE,
    max_length  INTEGER,              -- most ready tasks; NULL: no limit
    paused      INTEGER NOT NULL DEFAULT 0 -- 1: nothing of it is dealt
);

CREATE TABLE task (
    seq          INTEGER PRIMARY KEY, -- the order in its queue; a retried task gets a new one, at the end
    queue        INTEGER NOT NULL REFERENCES queue (id),
    state        TEXT NOT NULL DEFAULT 'ready' CHECK (state IN ('ready', 'delayed', 'limited', 'running', 'dead')),
    id           TEXT NOT NULL,
    name         TEXT,                -- NULL: for the queue's default task
    body         BLOB NOT NULL,
    content_type TEXT,
    attempt      INTEGER NOT NULL,
    enqueued_at  REAL,                -- Unix time
    last_error   TEXT,
    due          REAL,                -- Unix time before which it does not run
    expires_at   REAL,                -- Unix time after which it does not start
    headers      BLOB,                -- msgpack; NULL: none
    returns      INTEGER NOT NULL DEFAULT 0,
    consumer     INTEGER,             -- running: whose it is
    token        INTEGER,             -- running: the fence; no two deliveries have the same
    reason       TEXT,                -- dead: why
    traceback    TEXT,
    died_at      REAL,
    priority     INTEGER,             -- the higher first; NULL: none given, which is like 4
    worker       TEXT,                -- dead: who gave it up
    unique_key   TEXT,                -- no other task has it that has not ended; a dead letter has it in its headers
    lane         INTEGER              -- where it waits for limits; running, or ready again, it has a permit of each
);
CREATE UNIQUE INDEX task_id ON task (id);
CREATE INDEX task_ready ON task (queue, coalesce(priority, 4) DESC, seq) WHERE state = 'ready';
CREATE INDEX task_delayed ON task (due) WHERE state = 'delayed';
CREATE INDEX task_running ON task (consumer, token) WHERE state = 'running';
CREATE UNIQUE INDEX task_unique ON task (unique_key) WHERE unique_key IS NOT NULL;
CREATE INDEX task_dead ON task (queue, seq) WHERE state = 'dead';
CREATE INDEX task_limited ON task (lane, coalesce(priority, 4) DESC, seq) WHERE state = 'limited';
CREATE INDEX task_lane ON task (lane) WHERE lane IS NOT NULL;

-- Keys that tasks have for a while, whatever becomes of them.
CREATE TABLE unique_hold (
    key   TEXT PRIMARY KEY,
    id    TEXT NOT NULL,              -- of the task
    until REAL NOT NULL               -- Unix time
) WITHOUT ROWID;
CREATE INDEX unique_hold_until ON unique_hold (until);

-- A living consumer holds its wake-up, a named pipe, open; the kernel closes it when the process dies.
CREATE TABLE consumer (
    id        INTEGER PRIMARY KEY AUTOINCREMENT,
    bell      TEXT NOT NULL UNIQUE,
    describes INTEGER NOT NULL DEFAULT 0 -- 1: asked what it does, it answers
);

-- A consumer's share of one queue.
CREATE TABLE taker (
    queue     INTEGER NOT NULL REFERENCES queue (id),
    consumer  INTEGER NOT NULL REFERENCES consumer (id),
    free      INTEGER,                -- unused credit; NULL: no limit
    turn      INTEGER NOT NULL,       -- whoever was dealt to last has the highest
    PRIMARY KEY (queue, consumer)
) WITHOUT ROWID;

-- What became of a task, for whoever asks; kept for a while.
CREATE TABLE record (
    seq     INTEGER PRIMARY KEY,
    id      TEXT NOT NULL UNIQUE,
    change  INTEGER NOT NULL,         -- the last one's number, by the clock
    at      REAL NOT NULL,            -- Unix time
    status  BLOB NOT NULL             -- JSON
);
CREATE INDEX record_at ON record (at);
CREATE INDEX record_change ON record (change);

-- Who wants to know of which task: it is woken.
CREATE TABLE watch (
    task      TEXT NOT NULL,          -- '': every task
    consumer  INTEGER NOT NULL,
    PRIMARY KEY (task, consumer)
) WITHOUT ROWID;
CREATE INDEX watch_consumer ON watch (consumer);

-- Tasks that were cancelled while a consumer had them.
CREATE TABLE mark (
    consumer  INTEGER NOT NULL,
    task      TEXT NOT NULL,
    at        REAL NOT NULL,          -- Unix time
    PRIMARY KEY (consumer, task)
) WITHOUT ROWID;

-- What a consumer is asked to tell of itself, and by whom.
CREATE TABLE question (
    asker     INTEGER NOT NULL,       -- its bell is rung at each answer
    consumer  INTEGER NOT NULL,
    answer    BLOB,                   -- JSON; NULL: none yet
    PRIMARY KEY (asker, consumer)
) WITHOUT ROWID;
CREATE INDEX question_consumer ON question (consumer);

-- What enqueues tasks by the clock.
CREATE TABLE schedule (
    name      TEXT PRIMARY KEY,
    due       REAL,                   -- Unix time of its next task; NULL: none is to come, or it is paused
    declared  REAL,                   -- Unix time when its application's code last had it; NULL: it is data
    row       BLOB NOT NULL           -- JSON
) WITHOUT ROWID;
CREATE INDEX schedule_due ON schedule (due) WHERE due IS NOT NULL;

-- What an application and its operators say of a limit.
CREATE TABLE limit_row (
    name      TEXT PRIMARY KEY,
    row       BLOB NOT NULL           -- JSON
) WITHOUT ROWID;

-- What is admitted of a limit with a key, declared or not.
CREATE TABLE limit_use (
    id        INTEGER PRIMARY KEY,
    name      TEXT NOT NULL,
    key       TEXT NOT NULL,          -- '': the limit has none
    admitted  INTEGER NOT NULL DEFAULT 0, -- tasks that have a permit
    full_at   REAL NOT NULL DEFAULT 0, -- Unix time when a whole burst of its rate may start again
    wake_at   REAL                    -- Unix time when it has room for what it holds up; NULL: that is not by the clock
);
CREATE UNIQUE INDEX limit_use_key ON limit_use (name, key);
CREATE INDEX limit_use_wake ON limit_use (wake_at) WHERE wake_at IS NOT NULL;

-- Where tasks wait that are alike in queue, limits and fairness key. It stays for its turn, and is forgotten some time.
CREATE TABLE lane (
    id        INTEGER PRIMARY KEY,
    queue     INTEGER NOT NULL,
    key       TEXT NOT NULL,          -- JSON: the limits, and for whom the tasks are
    uses      TEXT NOT NULL,          -- JSON: the numbers of the limits' uses, the queue's own too
    fair      TEXT,                   -- for whom they are; NULL: nobody in particular
    rank      INTEGER,                -- its first task's priority, negative, or one before that; NULL: none waits
    turn      INTEGER NOT NULL,       -- whoever was served last has the highest
    held_by   INTEGER                 -- the use that holds it up; NULL: none is known to
);
CREATE UNIQUE INDEX lane_key ON lane (queue, key);
CREATE INDEX lane_fair ON lane (queue, fair) WHERE fair IS NOT NULL;
CREATE INDEX lane_open ON lane (queue, rank, turn, id) WHERE rank IS NOT NULL AND held_by IS NULL;
CREATE INDEX lane_held ON lane (held_by, queue, rank, turn, id) WHERE held_by IS NOT NULL;

-- One row: numbers deliveries and turns.
CREATE TABLE clock (tick INTEGER NOT NULL);
INSERT INTO clock VALUES (0);
