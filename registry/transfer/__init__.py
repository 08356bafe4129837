"""Transfer: compare two models by name, shape, type and value, and load from one into the other what fits.

Source: what a user gives: a reference, a file, a network. Side: one of the two models that are compared, read from a
source. Pair: a tensor of one side and its partner on the other. Rename: a rule for the names of the first side. Plan:
what a transfer will do, tensor by tensor, before anything is changed. Adapter: a function that makes a tensor fit.
Rows: which rows of a classifier go where. Report: what a diff found, and the blocks that renderers draw. Refusal: why a
plan cannot be made, and what to add so that it can. Curve: a metric of one model by epoch.

It imports `registry.files`, `registry.checkpoints`, `registry.live`, `registry.configs`, `registry.reports`,
`registry.catalog` and `registry.store`. To add an adapter: a row in `adapters`; CONTRIBUTING.md goes
through it. To add a section to the diff report: a method in `report`.
"""
