"""Resuming: does a training script that is killed and resumed end where it would have ended in one go?

Trace: what a process did, one observation for each optimizer step. Straight, killed and resumed are the three processes
whose traces are compared. Difference: the first thing that is not equal. Cause: what usually makes such a difference.

It imports `registry.live`, `registry.home`, `registry.catalog` and `registry.store`. `observing` looks into a running
script, `traced` is the program that runs it in a folder of `scratch`, `trace` compares, `checking` starts the processes. A new cause is a row of
`CAUSES` in `causes`, and a line in `cause_of` that says what it is known by.
"""
