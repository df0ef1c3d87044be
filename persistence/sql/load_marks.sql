-- The marks of all partitions.
-- (no parameters)
SELECT partition, epoch, fence FROM partition_marks
