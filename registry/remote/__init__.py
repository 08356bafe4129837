"""The shared registry: packs and log in a bucket, which several hosts use through a folder of their own each.

One thing is asked of the object store beyond reading, writing and deleting: that an object can be created if there is
none of its name (`bucket`). `probe` finds out whether a store keeps to that. `objects` does it through obstore, and `services`
is the table of services: another one is a file such as `azure`, and a row there. `names` are a user's own for places.
"""
