-- Whether the server takes writes: it may be one that has been set read-only.
-- (no parameters)
SELECT current_setting('transaction_read_only') = 'off' AS writable
