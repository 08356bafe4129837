"""Transfer: compare two models by name, shape, type and value, and load from one into the other what fits.

Side: one of the two models that are compared. Pair: a tensor of one side and what it meets on the other. Plan: what a
transfer will do, tensor by tensor, before anything is changed. Adapter: a function that makes a tensor fit. Curve: a
metric of one model by epoch.

It imports `registry.files`, `registry.checkpoints`, `registry.live`, `registry.configs`, `registry.reports`,
`registry.catalog` and `registry.store`. To add an adapter: a row in `adapters`.
"""
