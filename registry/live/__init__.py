"""Live objects of torch: networks, optimizers, generators, data loaders, processes that train together.

Component: a part of a training with a state, such as `model` or `optimizer`. Builder: the function that makes a
registered network. Frozen: parameters that do not train, and layers that are held in evaluation mode. Rank: one of the
processes that train together.

It imports `registry.configs`, `registry.patterns`, `registry.log.reference` and `registry.store`, and touches no folder
of a registry. What is captured and restored is decided in `components`; what freezing holds, in `freezing`.
"""
