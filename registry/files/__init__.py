"""Files of other programs, read and written: `.pt`, safetensors, folders of shards, of Hugging Face and of torch.distributed.

Format: a kind of files, a row of the table in `formats`. Imported: what a file holds, ready to be saved. Outgoing: a
file that is about to be written. Layout: where the parts of a checkpoint lie in the dict that a program saved. Foreign:
what cannot be imported, and what to do with it. Nothing that a file names is run.

It imports `registry.checkpoints`, `registry.catalog`, `registry.log`, `registry.progress` and `registry.store`. A new
format is one module with `read` and `write`, and one row in `formats`.
"""
