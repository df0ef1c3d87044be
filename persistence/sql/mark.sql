-- Notes how far a transaction gets with a partition. Records of an older epoch than the newest come from a Redis that another
-- one has taken over from, and which the other does not know of: the epoch ends, so that every session is looked at again.
-- $1 int (partition), $2 bigint (epoch of the records), $3 bigint (their newest fence)
INSERT INTO partition_marks AS stored (partition, epoch, fence) VALUES ($1, $2, $3)
ON CONFLICT (partition) DO UPDATE SET
    epoch = CASE WHEN excluded.epoch < stored.epoch THEN stored.epoch + 1 ELSE excluded.epoch END,
    fence = greatest(stored.fence, excluded.fence),
    marked_at = now()
