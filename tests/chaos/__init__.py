"""`scripts/chaos`: real processes, real visitors, faults from a seed, and then the history is checked.

`site` starts the processes, `faults` harms them, `visitors` talk meanwhile and write down in `ledger` what they sent and
what they were answered, `verdict` compares that with what Redis and Postgres hold in the end, `report` prints it, and
`run` puts one after the other.
"""
