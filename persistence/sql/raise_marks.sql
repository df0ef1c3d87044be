-- Notes the epochs that partitions have begun.
-- $1 int[] (partitions, in ascending order), $2 bigint[] (epochs)
INSERT INTO partition_marks AS stored (partition, epoch)
SELECT partition, epoch FROM unnest($1::int[], $2::bigint[]) AS begun (partition, epoch)
ON CONFLICT (partition) DO UPDATE SET epoch = greatest(stored.epoch, excluded.epoch), marked_at = now()
