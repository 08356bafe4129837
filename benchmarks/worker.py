"""One peer in a process of its own. It reads commands as lines of JSON, times them, and answers in lines of JSON.

It runs in the peer's environment, which has only the peer, torch and the standard library. Every timed save ends with
the bytes on the disk: what a peer has not flushed itself is flushed for it, within its time.
"""

from __future__ import annotations

import ctypes
import io
import json
import logging
import os
import shutil
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

Tree = Any
"""A state: tensors in dicts and lists."""


class Peer:
    """A tool that saves states under numbers into a folder, and loads them again."""

    def open(self, folder: Path) -> None:
        """Begin in an empty folder."""
        self.folder = folder

    def save(self, state: Tree, number: int) -> None:
        """Save a state under a number."""
        raise NotImplementedError

    def load(self, number: int) -> Tree:
        """Load the state of a number."""
        raise NotImplementedError

    def close(self) -> None:
        """Remove working copies before the bytes on the disk are counted."""


class Torch(Peer):
    """`torch.save` and `torch.load`, a file for each state."""

    mmap = False

    def save(self, state: Tree, number: int) -> None:
        torch.save(state, self.folder / f"{number}.pt")

    def load(self, number: int) -> Tree:
        return torch.load(self.folder / f"{number}.pt", weights_only=True, mmap=self.mmap)


class TorchMapped(Torch):
    """`torch.load(mmap=True)`."""

    mmap = True


class Safetensors(Peer):
    """A file for each state. Its format holds named tensors. The rest of a state goes into the header as text."""

    def save(self, state: Tree, number: int) -> None:
        from safetensors.torch import save_file

        rest = json.dumps(_without_tensors(state))
        save_file(_flat(state), self.folder / f"{number}.safetensors", metadata={"rest": rest})

    def load(self, number: int) -> Tree:
        from safetensors.torch import load_file

        return load_file(self.folder / f"{number}.safetensors")


class FastSafetensors(Safetensors):
    """The same file, loaded by fastsafetensors into memory of the processor: it reads in threads, and maps nothing."""

    def load(self, number: int) -> Tree:
        from fastsafetensors import SafeTensorsFileLoader, SingleGroup

        loader = SafeTensorsFileLoader(SingleGroup(), device="cpu", nogds=True)
        loader.add_filenames({0: [str(self.folder / f"{number}.safetensors")]})
        self._files = loader.copy_files_to_device()
        return {name: self._files.get_tensor(name) for name in loader.get_keys()}


class Tensorizer(Peer):
    """A file of named tensors for each state, read with its hashes verified. The rest of a state is left out."""

    def save(self, state: Tree, number: int) -> None:
        from tensorizer import TensorSerializer

        serializer = TensorSerializer(str(self.folder / f"{number}.tensors"))
        serializer.write_state_dict(_flat(state))
        serializer.close()

    def load(self, number: int) -> Tree:
        from tensorizer import TensorDeserializer

        path = str(self.folder / f"{number}.tensors")
        with TensorDeserializer(path, device="cpu", verify_hash=True) as found:
            return {name: found[name].detach() for name in found.keys()}  # noqa: SIM118 - it is no dict


class TorchCheckpointing(Peer):
    """`torch_checkpointing` in one process, which waits for each save, as staging without CUDA is slower."""

    def open(self, folder: Path) -> None:
        from torch_checkpointing import CheckpointManager
        from torch_checkpointing.storage.filesystem import LocalFileSystemStorageConfig

        super().open(folder)
        config = CheckpointManager.Config.with_sync_save()
        # With direct I/O, its default, a write of a few bytes fails with "Invalid argument" on ext4.
        config.storage_config = LocalFileSystemStorageConfig(use_direct_io=False)
        self._manager = CheckpointManager(config)

    def save(self, state: Tree, number: int) -> None:
        self._manager.save(str(self.folder / str(number)), state)
        self._like = state

    def load(self, number: int) -> Tree:
        into = _map(self._like, torch.empty_like)
        return dict(self._manager.load(str(self.folder / str(number)), into=into))

    def close(self) -> None:
        self._manager.close()


class ZipNN(Peer):
    """The bytes of a safetensors file, compressed by zipnn as numbers of float32."""

    def open(self, folder: Path) -> None:
        from zipnn import ZipNN as Coder

        super().open(folder)
        self._coder = Coder(input_format="byte", bytearray_dtype="float32", threads=os.cpu_count() or 1)

    def save(self, state: Tree, number: int) -> None:
        from safetensors.torch import save

        data = save(_flat(state), metadata={"rest": json.dumps(_without_tensors(state))})
        (self.folder / f"{number}.znn").write_bytes(self._coder.compress(bytearray(data)))

    def load(self, number: int) -> Tree:
        from safetensors.torch import load

        return load(bytes(self._coder.decompress((self.folder / f"{number}.znn").read_bytes())))


class DistributedCheckpoint(Peer):
    """`torch.distributed.checkpoint` in one process, a folder for each state."""

    def save(self, state: Tree, number: int) -> None:
        import torch.distributed.checkpoint as dcp

        dcp.save(state, checkpoint_id=self.folder / str(number), no_dist=True)
        self._like = state

    def load(self, number: int) -> Tree:
        import torch.distributed.checkpoint as dcp

        state = _map(self._like, torch.empty_like)
        dcp.load(state, checkpoint_id=self.folder / str(number), no_dist=True)
        return state


class Joblib(Peer):
    """`joblib.dump` and `joblib.load`, a file for each state."""

    def save(self, state: Tree, number: int) -> None:
        import joblib

        joblib.dump(state, self.folder / f"{number}.joblib")

    def load(self, number: int) -> Tree:
        import joblib

        return joblib.load(self.folder / f"{number}.joblib")


class DVC(Peer):
    """A file of `torch.save`, added to DVC's cache and checked out of it. Its small `.dvc` files would be in git."""

    def open(self, folder: Path) -> None:
        from dvc.repo import Repo

        super().open(folder)
        self._repo = Repo.init(str(folder), no_scm=True)
        self._pointers: dict[int, bytes] = {}

    def save(self, state: Tree, number: int) -> None:
        file = self.folder / "model.pt"
        torch.save(state, file)
        self._repo.add(str(file))
        self._pointers[number] = Path(f"{file}.dvc").read_bytes()

    def load(self, number: int) -> Tree:
        file = self.folder / "model.pt"
        file.unlink(missing_ok=True)
        Path(f"{file}.dvc").write_bytes(self._pointers[number])
        self._repo.checkout(force=True)
        return torch.load(file, weights_only=True)

    def close(self) -> None:
        (self.folder / "model.pt").unlink(missing_ok=True)


class DVCPushed(DVC):
    """The same, pushed to a bucket. A load pulls it with an empty cache."""

    def open(self, folder: Path) -> None:
        super().open(folder)
        with self._repo.config.edit() as config:
            config["remote"]["bucket"] = {
                "url": f"s3://{os.environ['BENCHMARK_BUCKET']}/{folder.name}",
                "endpointurl": os.environ["AWS_ENDPOINT_URL"],
            }
            config["core"]["remote"] = "bucket"

    def save(self, state: Tree, number: int) -> None:
        super().save(state, number)
        self._repo.push()

    def load(self, number: int) -> Tree:
        file = self.folder / "model.pt"
        file.unlink(missing_ok=True)
        shutil.rmtree(self.folder / ".dvc" / "cache", ignore_errors=True)
        Path(f"{file}.dvc").write_bytes(self._pointers[number])
        self._repo.pull(force=True)
        return torch.load(file, weights_only=True)


class Boto3(Peer):
    """`torch.save` into memory, and boto3's `upload_fileobj`, which sends parts side by side; likewise back."""

    def open(self, folder: Path) -> None:
        import boto3

        super().open(folder)
        self._bucket = os.environ["BENCHMARK_BUCKET"]
        self._client = boto3.client(
            "s3", endpoint_url=os.environ["AWS_ENDPOINT_URL"], region_name="us-east-1"
        )

    def _key(self, number: int) -> str:
        return f"{self.folder.name}/{number}.pt"

    def save(self, state: Tree, number: int) -> None:
        data = io.BytesIO()
        torch.save(state, data)
        data.seek(0)
        self._client.upload_fileobj(data, self._bucket, self._key(number))

    def load(self, number: int) -> Tree:
        data = io.BytesIO()
        self._client.download_fileobj(self._bucket, self._key(number), data)
        data.seek(0)
        return torch.load(data, weights_only=True)


class S3fs(Peer):
    """`torch.save` into a file of s3fs, as of fsspec, and `torch.load` of all its bytes."""

    def open(self, folder: Path) -> None:
        import s3fs

        super().open(folder)
        self._files = s3fs.S3FileSystem(endpoint_url=os.environ["AWS_ENDPOINT_URL"])

    def _path(self, number: int) -> str:
        return f"{os.environ['BENCHMARK_BUCKET']}/{self.folder.name}/{number}.pt"

    def save(self, state: Tree, number: int) -> None:
        with self._files.open(self._path(number), "wb") as file:
            torch.save(state, file)

    def load(self, number: int) -> Tree:
        return torch.load(io.BytesIO(self._files.cat_file(self._path(number))), weights_only=True)


class MLflow(Peer):
    """`mlflow.pytorch.log_state_dict` into a run, in a database and a folder on this machine."""

    def open(self, folder: Path) -> None:
        import mlflow

        super().open(folder)
        mlflow.set_tracking_uri(f"sqlite:///{folder}/mlflow.db")
        experiment = mlflow.create_experiment("benchmark", artifact_location=self.artifacts(folder))
        self._run = mlflow.start_run(experiment_id=experiment).info.run_id

    def artifacts(self, folder: Path) -> str:
        """Where the states go."""
        return (folder / "artifacts").as_uri()

    def save(self, state: Tree, number: int) -> None:
        import mlflow.pytorch

        mlflow.pytorch.log_state_dict(state, f"checkpoint-{number}")

    def load(self, number: int) -> Tree:
        import mlflow.pytorch

        return mlflow.pytorch.load_state_dict(f"runs:/{self._run}/checkpoint-{number}", weights_only=True)

    def close(self) -> None:
        import mlflow

        mlflow.end_run()


class MLflowInBucket(MLflow):
    """The same, with its artifacts in a bucket."""

    def artifacts(self, folder: Path) -> str:
        os.environ["MLFLOW_S3_ENDPOINT_URL"] = os.environ["AWS_ENDPOINT_URL"]
        return f"s3://{os.environ['BENCHMARK_BUCKET']}/{folder.name}"


class Coral(Peer):
    """A commit of named arrays for each state. Arrays have one dimension at least. The rest of a state is left out."""

    def open(self, folder: Path) -> None:
        from coral import Repository

        super().open(folder)
        self._repository = Repository(folder, init=True)
        self._commits: dict[int, str] = {}

    def save(self, state: Tree, number: int) -> None:
        import numpy
        from coral import WeightTensor
        from coral.core.weight_tensor import WeightMetadata

        weights = {}
        for name, tensor in _flat(state).items():
            array = numpy.atleast_1d(tensor.numpy())
            metadata = WeightMetadata(name=name, shape=array.shape, dtype=array.dtype)
            weights[name] = WeightTensor(data=array, metadata=metadata)
        self._repository.stage_weights(weights)
        self._commits[number] = self._repository.commit(f"checkpoint {number}").commit_hash
        self._shapes = {name: tensor.shape for name, tensor in _flat(state).items()}

    def load(self, number: int) -> Tree:
        found = self._repository.get_all_weights(self._commits[number])
        return {
            name: torch.from_numpy(weight.data).reshape(self._shapes[name]) for name, weight in found.items()
        }


class TorchRegistry(Peer):
    """This package. Loads are mapped and verified, as by default."""

    copy = False

    def open(self, folder: Path) -> None:
        from registry import Registry
        from registry.store.fingerprints import remembered

        super().open(folder)
        # The state of another round may have had the same memory.
        remembered.forget()
        self._registry = Registry(folder)

    def save(self, state: Tree, number: int) -> None:
        self._registry.save("net", state)

    def load(self, number: int) -> Tree:
        return self._registry[f"net:v{number}"].load(copy=self.copy)

    def close(self) -> None:
        # What is written ahead of the catalog is there only as long as a process has it open.
        self._registry.catalog.close()


class TorchRegistryOwned(TorchRegistry):
    """This package. Loads are copied and verified."""

    copy = True


class TorchRegistryCompacted(TorchRegistry):
    """This package. Versions are compacted before the bytes are counted."""

    def close(self) -> None:
        self._registry.compact()
        self._registry.collect_garbage(grace=0)
        super().close()


PEERS: dict[str, type[Peer]] = {
    "torch": Torch,
    "torch mmap": TorchMapped,
    "safetensors": Safetensors,
    "fastsafetensors": FastSafetensors,
    "tensorizer": Tensorizer,
    "torch_checkpointing": TorchCheckpointing,
    "zipnn": ZipNN,
    "dcp": DistributedCheckpoint,
    "joblib": Joblib,
    "dvc": DVC,
    "dvc push": DVCPushed,
    "boto3": Boto3,
    "s3fs": S3fs,
    "mlflow": MLflow,
    "mlflow bucket": MLflowInBucket,
    "coral": Coral,
    "registry": TorchRegistry,
    "registry owned": TorchRegistryOwned,
    "registry compacted": TorchRegistryCompacted,
}
"""Every peer by its key."""


class Worker:
    """Carries out commands, one after the other."""

    def __init__(self, peer: Peer) -> None:
        self.peer = peer
        self.state: Tree = None
        self.number = 0

    def do(self, command: dict[str, Any]) -> dict[str, Any]:
        """Carry out one command, and return its answer."""
        return getattr(self, f"do_{command.pop('do')}")(**command)

    def do_open(self, folder: str) -> dict[str, Any]:
        """Open the peer in an empty folder."""
        shutil.rmtree(folder, ignore_errors=True)
        Path(folder).mkdir(parents=True)
        self.number = 0
        self._synced: dict[Path, int] = {}
        self.peer.open(Path(folder))
        return {}

    def do_state(self, file: str) -> dict[str, Any]:
        """Read the state in a file of `torch.save`, to save it later."""
        self.state = None
        self.state = torch.load(file, weights_only=True)
        return {}

    def do_save(self) -> dict[str, Any]:
        """Save the state, and sync what the peer has written."""
        self.number += 1

        def save() -> None:
            self.peer.save(self.state, self.number)
            self._sync()

        return _measured(save)[1]

    def do_load(self, update: bool, check: bool) -> dict[str, Any]:
        """Load the last state.

        Args:
            update: change all of it in place, within its time.
            check: compare it with what was saved, unless it is changed.
        """

        def load() -> Tree:
            tree = self.peer.load(self.number)
            if update:
                for tensor in _flat(tree).values():
                    if tensor.is_floating_point():
                        tensor.mul_(0.9)
            return tree

        tree, found = _measured(load)
        return found | {"differs": _difference(tree, self.state) if check and not update else ""}

    def do_close(self) -> dict[str, Any]:
        """Close the peer, and count the bytes on the disk."""
        began = time.perf_counter()
        self.peer.close()
        seconds = time.perf_counter() - began
        files = [Path(top, name) for top, _, names in os.walk(self.peer.folder) for name in names]
        return {"bytes": sum(file.lstat().st_blocks * 512 for file in files), "seconds": seconds}

    def _sync(self) -> None:
        for top, _, names in os.walk(self.peer.folder):
            for name in names:
                file = Path(top, name)
                changed = file.lstat().st_mtime_ns
                if self._synced.get(file) != changed:
                    fd = os.open(file, os.O_RDONLY)
                    os.fsync(fd)
                    os.close(fd)
                    self._synced[file] = changed


def _measured(action: Callable[[], Any]) -> tuple[Any, dict[str, Any]]:
    """Run an action. Returns its result, and its seconds with the bytes of memory that it took at its peak."""
    ctypes.CDLL(None).malloc_trim(0)
    # This resets the peak.
    Path("/proc/self/clear_refs").write_text("5")
    before = _memory("VmRSS")
    began = time.perf_counter()
    found = action()
    seconds = time.perf_counter() - began
    return found, {"seconds": seconds, "memory": max(0, _memory("VmHWM") - before)}


def _memory(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"no {field} in /proc/self/status")


def _flat(tree: Tree, path: str = "") -> dict[str, torch.Tensor]:
    if isinstance(tree, torch.Tensor):
        return {path: tree}
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return {name: t for key, item in items for name, t in _flat(item, f"{path}/{key}".strip("/")).items()}


def _map(tree: Tree, change: Callable[[torch.Tensor], torch.Tensor]) -> Tree:
    if isinstance(tree, torch.Tensor):
        return change(tree)
    if isinstance(tree, dict):
        return {key: _map(item, change) for key, item in tree.items()}
    return [_map(item, change) for item in tree] if isinstance(tree, list) else tree


def _without_tensors(tree: Tree) -> Tree:
    if isinstance(tree, torch.Tensor):
        return None
    if isinstance(tree, dict):
        return {str(key): _without_tensors(item) for key, item in tree.items()}
    return [_without_tensors(item) for item in tree] if isinstance(tree, list) else tree


def _difference(found: Tree, state: Tree) -> str:
    """What has not come back bit for bit; empty if everything has."""
    loaded = _flat(found)
    differing = []
    for name, tensor in _flat(state).items():
        other = loaded.get(name)
        if other is None or (other.dtype, other.shape) != (tensor.dtype, tensor.shape):
            return f"{name} does not come back"
        if not torch.equal(other, tensor):
            differing.append(name)
    return f"{len(differing)} tensors come back changed" if differing else ""


def main() -> None:
    """Read commands from the standard input, and write the answers to the standard output."""
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    # What a peer prints is not an answer.
    os.dup2(2, 1)
    try:
        worker = Worker(PEERS[sys.argv[1]]())
        for line in sys.stdin:
            answers.write(json.dumps(worker.do(json.loads(line))) + "\n")
    except Exception as error:
        traceback.print_exc()
        answers.write(json.dumps({"error": f"{type(error).__name__}: {error}"}) + "\n")


if __name__ == "__main__":
    main()
