"""Content-addressed storage: trees of tensors and plain values in, digests out.

Words: a *leaf* is one distinct tensor of a tree (tree.py). A *pack* is a file of tensors (pack.py), and a *manifest* the
document that refers to them (manifest.py); a *slot* is the position of a tensor in its list. A tensor may be stored as
its *difference* from another one, its *base*, or from zeros if it is coded *by itself* (differences.py), in *planes* of
bytes or *classes* of elements (planes.py, classes.py, splitting.py). A *location* says where a tensor lies, and what is
*wanted* is loaded from there (locating.py, loading.py) or copied into live tensors (filling.py). What is not in the page
cache is *cold*, and is read in ways of its own (page_cache.py, direct.py). A save goes through three stages: `Encoded`
(saving.py), `Written` and `Stored` (store.py).

It knows tensors, bytes and digests, and nothing of models, runs or metrics. It imports nothing of the project. To add an
element type: a row in dtypes.py, and the other two steps in CONTRIBUTING.md.
"""
