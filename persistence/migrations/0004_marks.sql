-- How far Postgres is with each partition of Redis: the newest epoch of which it has records, and the newest fence of a turn.
-- A Redis that says less has forgotten something.
CREATE TABLE partition_marks (
    partition int PRIMARY KEY,
    epoch bigint NOT NULL,
    fence bigint NOT NULL DEFAULT 0,
    marked_at timestamptz NOT NULL DEFAULT now()
);
