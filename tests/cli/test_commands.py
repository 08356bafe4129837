"""The commands: what they print, as text and as JSON, and how they end."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import Run
from terminal import on_a_terminal

from registry import Registry
from registry.store.errors import Invalid, NotFound

SCRIPT = Path(sys.executable).with_name("registry")


def stamp_free(text: str) -> list[str]:
    """Lines without times, ids and the space around columns."""
    text = re.sub(r"\d{4}-\d\d-\d\d \d\d:\d\d", "TIME", text)
    text = re.sub(r"\d+ s ago", "AGO", text)
    return [" ".join(re.sub(r"\b[0-9a-f]{12}\b", "ID", line).split()) for line in text.splitlines()]


def test_init_makes_a_registry_once(tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("REGISTRY_ROOT", raising=False)
    assert run("init") == (0, "Made a registry at .registry\n", "")
    assert run("init") == (0, "There is a registry already at .registry\n", "")
    assert run("init", "other", "--json").json == {"root": "other", "created": True}
    assert run("ls") == (0, "", "no models yet; store one with: registry import FILE --name MODEL\n")
    for place in (".registry", "other"):
        assert (tmp_path / place / "registry.toml").is_file()


def test_git_ignores_a_registry_in_a_working_tree(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run("init", "outside").status == 0
    assert not (tmp_path / "outside" / ".gitignore").exists()
    subprocess.run(["git", "init", "--quiet", "project"], check=True)
    monkeypatch.chdir(tmp_path / "project")
    Path("inner").mkdir()
    assert run("init", "inner/.registry").status == 0
    shown = subprocess.run(["git", "status", "--short", "-uall"], capture_output=True, text=True, check=True)
    assert shown.stdout == ""
    Path("code").mkdir()
    Path("code/train.py").write_text("")
    assert run("init", "code").status == 0
    assert not Path("code/.gitignore").exists()
    Path("inner/.registry/.gitignore").write_text("packs/\n")
    assert run("init", "inner/.registry").status == 0
    assert Path("inner/.registry/.gitignore").read_text() == "packs/\n"


def test_advice_keeps_the_folder_that_was_given(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("REGISTRY_ROOT", raising=False)
    for words in (["--root", "my models", "ls"], ["ls", "--root=my models"]):
        done = run(*words)
        assert done.err == (
            "error: there is no registry at my models\nhint:  make one with: registry --root 'my models' init\n"
        )
    assert run("ls").err == "error: there is no registry at .registry\nhint:  make one with: registry init\n"


def test_list_shows_models_and_their_latest(filled: Registry, run: Run) -> None:
    assert stamp_free(run("ls").out) == [
        "MODEL VERSIONS BEST ACCURACY TREND OWN UPDATED EPOCH LOSS ID",
        "lenet5 4 v4 (latest) 0.4 ▁▃▆█ 17.1 kB AGO 4 0.25 ID",
        "resnet 1 v1 (latest) 4.11 kB AGO ID",
    ]
    models = run("ls", "--json").json["models"]
    assert [(m["name"], m["versions"], m["latest"]["name"]) for m in models] == [
        ("lenet5", 4, "lenet5:v4"),
        ("resnet", 1, "resnet:v1"),
    ]


def test_list_shows_versions_the_newest_first(filled: Registry, run: Run) -> None:
    assert stamp_free(run("ls", "lenet5").out) == [
        "NAME EPOCH LOSS ACCURACY ALIASES TAGS SIZE CREATED ID",
        "lenet5:v4 4 0.25 0.4 200 B TIME ID",
        "lenet5:v3 3 nan 0.3 paper 200 B TIME ID",
        "lenet5:v2 2 0.50 0.2 production 200 B TIME ID",
        "lenet5:v1 1 1.00 0.1 200 B TIME ID",
    ]


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["lenet5", "--sort", "accuracy"], "4 3 2 1"),
        (["lenet5", "--sort", "accuracy", "--smallest"], "1 2 3 4"),
        (["lenet5", "--sort", "loss"], "4 2 1"),
        (["--sort", "accuracy", "--limit", "2"], "4 3"),
        (["--tag", "paper"], "3"),
        (["lenet5", "--tag", "none"], ""),
        (["lenet5", "--limit", "0"], "4 3 2 1"),
        (["lenet5", "--sort", "accuracy", "--largest"], "4 3 2 1"),
        (["lenet5", "--sort", "loss", "--largest"], "1 2 4"),
    ],
)
def test_list_orders_and_filters(filled: Registry, run: Run, arguments: list[str], names: str) -> None:
    document = run("ls", *arguments, "--json").json
    assert " ".join(str(version["version"]) for version in document["versions"]) == names


def test_matching_a_metric_that_is_not_there_suggests(filled: Registry, run: Run) -> None:
    outcome = run("ls", "lenet5", "--match", "acuracy>0")
    assert outcome.status == 1
    assert "'acuracy'" in outcome.err
    assert "did you mean 'accuracy'?" in outcome.err


def test_sorting_by_what_is_not_there_suggests(filled: Registry, run: Run) -> None:
    outcome = run("ls", "lenet5", "--sort", "acuracy")
    assert outcome.status == 1
    assert (
        outcome.err
        == "error: no version of lenet5 has the metric 'acuracy'\nhint:  did you mean 'accuracy'?\n"
    )


@pytest.mark.parametrize(
    "command", [("best", "lenet5", "--by"), ("compare", "lenet5", "--metric"), ("ls", "--sort")]
)
def test_a_metric_that_nothing_has_is_told_before_its_direction_is_asked(
    filled: Registry, run: Run, command: tuple[str, ...]
) -> None:
    for name in ("acuracy", "acc"):
        outcome = run(*command, name)
        assert outcome.status == 1
        assert outcome.err.endswith("\nhint:  did you mean 'accuracy'?\n")


def test_a_direction_is_asked_for_in_the_language_of_the_call(filled: Registry, run: Run) -> None:
    registry = filled
    registry.save("net", {"model": {"w": torch.ones(1)}}, metrics={"depth": 1.0})
    assert run("best", "net", "--by", "depth").err.endswith("\nhint:  add --smallest or --largest\n")
    with pytest.raises(Invalid, match=r"; add smallest=True or smallest=False$"):
        registry.best("net", "depth")
    with pytest.raises(NotFound, match="no version of net has the metric 'dept'; did you mean 'depth'"):
        registry.best("net", "dept")
    with pytest.raises(NotFound, match="there is no model 'nett'; did you mean 'net'"):
        registry.best("nett", "dept")


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("accuracy>0.2", "4 3"),
        ("accuracy >= .2", "4 3 2"),
        ("accuracy=0.3", "3"),
        ("loss<0.5", "4"),
        ("accuracy>0.2 and loss<0.5", "4"),
        ("PAPER", "3"),
        ("@prod", "2"),
        ("alert", "2"),
        ("lenet5:v1", "1"),
        ("%", ""),
        ("l_net", ""),
    ],
)
def test_versions_are_found_by_texts_and_metrics(
    filled: Registry, run: Run, pattern: str, names: str
) -> None:
    document = run("ls", "--match", pattern, "--json").json
    assert " ".join(str(version["version"]) for version in document["versions"]) == names


def test_a_version_is_found_by_the_beginning_of_its_id(filled: Registry, run: Run) -> None:
    wanted = filled["lenet5:v3"].id
    assert run("ls", "--match", wanted[:10], "-q").out == "lenet5:v3\n"
    assert run("ls", "--match", wanted[1:11], "-q").out == ""


def test_what_nothing_holds_is_listed_for_removal(filled: Registry, run: Run) -> None:
    for _ in range(2):
        filled.save("lenet5", {"model": {"w": torch.ones(1)}})
    edge = {"kind": "resumed-from", "parent": filled["lenet5:v4"].id}
    filled.save("resnet", {"model": {"w": torch.ones(2)}}, lineage=[edge])
    assert run("ls", "--unheld", "-q").out.split() == ["lenet5:v5", "lenet5:v1", "resnet:v1"]
    assert run("ls", "--unheld", "--sort", "accuracy", "-q").out.split() == ["lenet5:v1"]
    line = f"{SCRIPT} ls lenet5 --unheld -q | xargs {SCRIPT} rm --yes"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=True)
    assert done.stdout.endswith(
        "2 versions removed; registry gc frees the space in an hour, or at once with --grace 0\n"
    )
    assert run("ls", "lenet5", "-q").out.split() == [f"lenet5:v{n}" for n in (6, 4, 3, 2)]
    nothing = run("ls", "lenet5", "--unheld", "--tag", "paper")
    assert (nothing.out, nothing.err) == ("", "no version of lenet5 has the tag 'paper' and is unheld\n")


def test_references_that_are_piped_on_are_not_cut_at_a_number_of_rows(filled: Registry, run: Run) -> None:
    for _ in range(21):
        filled.save("many", {"model": {"w": torch.ones(1)}})
    assert len(run("ls", "many", "-q").out.split()) == 21
    assert len(run("ls", "many", "-q", "--limit", 3).out.split()) == 3
    assert run("ls", "many").out.endswith("20 versions of 21; --limit 0 shows all\n")


def test_list_says_what_its_limit_hides(filled: Registry, run: Run) -> None:
    assert run("ls", "lenet5", "--limit", 1).out.endswith("1 version of 4; --limit 0 shows all\n")
    assert run("ls", "lenet5", "--limit", 1, "--json").json["total"] == 4


def test_show_prints_what_is_recorded(filled: Registry, run: Run) -> None:
    text = run("show", "lenet5@production", "--params").out
    lines = stamp_free(text)
    assert lines[:-2] == [
        "lenet5:v2 ID production TIME",
        "50 values, float32 200 B in 2 tensors",
        "epoch 2 loss 0.5 accuracy 0.2",
        "config optimizer.lr 0.2 layers 6, 16",
        "meta seed 2",
        "note TIME red \\x1b[31malert\\x1b[0m",
        "COMPONENT TENSORS VALUES SIZE",
        "model 2 50 200 B",
        "no tensors: optimizer",
        "",
        "PATH DTYPE SHAPE VALUES DIGEST",
    ]
    assert "model/fc.weight float32 10×4 40 ID" in lines
    assert "\x1b" not in text


KEYS = {
    *(
        "name",
        "model",
        "version",
        "id",
        "created",
        "epoch",
        "step",
        "loss",
        "metrics",
        "aliases",
        "tags",
        "notes",
    ),
    *("size", "tensors", "components", "config", "meta", "lineage", "source"),
}


def test_show_has_a_stable_shape_in_json(filled: Registry, run: Run) -> None:
    document = run("show", "lenet5:v3", "--json").json
    assert set(document) == KEYS
    assert (document["loss"], document["metrics"]) == (None, {"accuracy": 0.3})
    assert document["components"]["model"] == {"tensors": 2, "elements": 50, "bytes": 200}
    parameters = run("show", "lenet5:v3", "--params", "--json").json["parameters"]
    assert [set(p) for p in parameters] == [{"path", "dtype", "shape", "digest"}] * 2
    assert set(run("ls", "lenet5", "--json").json["versions"][0]) == KEYS


def test_an_id_prefix_is_a_reference(filled: Registry, run: Run) -> None:
    id = filled["lenet5:v1"].id
    assert run("show", id[:8], "--json").json["name"] == "lenet5:v1"


def test_status_sums_up(filled: Registry, run: Run) -> None:
    assert stamp_free(run("status").out)[1:4] == [
        "holds 2 models, 5 versions",
        "tensors 6 distinct, in 5 packs",
        "size 21.2 kB on disk for 812 B of checkpoints (0% shared)",
    ]
    document = run("status", "--json").json
    assert set(document) == {
        *(
            "root",
            "models",
            "versions",
            "artifacts",
            "tensors",
            "packs",
            "logical",
            "stored",
            "differences",
            "alone",
            "unused",
            "free",
        ),
        "saved",
        "runs",
    }
    assert document["logical"] == 4 * 200 + 12


def test_aliases_are_set_moved_listed_and_removed(filled: Registry, run: Run) -> None:
    assert run("alias", "lenet5:v1", "old").out == "lenet5@old → lenet5:v1\n"
    assert run("alias", "lenet5:v3", "old", "--json").json["name"] == "lenet5:v3"
    assert stamp_free(run("alias").out) == [
        "ALIAS VERSION ID",
        "lenet5@old lenet5:v3 ID",
        "lenet5@production lenet5:v2 ID",
    ]
    assert [row["alias"] for row in run("alias", "--json").json["aliases"]] == [
        "lenet5@old",
        "lenet5@production",
    ]
    assert run("alias", "--remove", "lenet5@old").out == "lenet5@old removed\n"
    assert run("alias", "--remove", "lenet5@old").status == 1
    assert run("alias", "lenet5", "best").err == (
        "error: the alias 'best' is kept by the registry\nhint:  choose another name\n"
    )
    assert run("alias", "lenet5").status == 2
    assert run("alias", "--remove", "lenet5").status == 2


def test_tags_and_notes_are_kept(filled: Registry, run: Run) -> None:
    assert run("tag", "lenet5:v1", "a", "b").out == "lenet5:v1  a, b\n"
    assert run("tag", "lenet5:v1", "a", "--remove", "--json").json == {"name": "lenet5:v1", "tags": ["b"]}
    assert run("tag", "--remove", "lenet5:v1", "c").status == 1
    assert run("note", "lenet5:v1", "one").out == "lenet5:v1  1 note\n"
    assert run("note", "lenet5:v1", "two", "--json").json["notes"][1]["text"] == "two"


def test_rm_says_what_it_will_remove_and_asks(filled: Registry, run: Run) -> None:
    done = run("rm", "lenet5:v1")
    assert done.status == 1
    assert stamp_free(done.out) == ["lenet5:v1 ID 200 B"]
    assert done.err == "error: nothing was removed\nhint:  add --yes to remove without a question\n"
    assert run("rm", "lenet5:v1", "--dry-run").out.endswith("1 version would be removed\n")
    assert len(run("ls", "lenet5", "--json").json["versions"]) == 4
    done = run("rm", "lenet5:v1", "lenet5:v4", "--yes")
    assert done.out.endswith(
        "2 versions removed; registry gc frees the space in an hour, or at once with --grace 0\n"
    )
    assert [v["version"] for v in run("ls", "lenet5", "--json").json["versions"]] == [3, 2]


def test_rm_refuses_what_is_held_and_removes_all_or_nothing(filled: Registry, run: Run) -> None:
    done = run("rm", "lenet5:v1", "lenet5:v2", "--yes")
    assert (
        done.err
        == "error: lenet5:v2 is held by alias production\nhint:  take that off first; or use: --force\n"
    )
    assert len(run("ls", "lenet5", "--json").json["versions"]) == 4
    assert run("rm", "lenet5:v1", "lenet5:v9", "--yes").status == 1
    assert len(run("ls", "lenet5", "--json").json["versions"]) == 4
    document = run("rm", "lenet5:v2", "--yes", "--force", "--json").json
    assert [version["name"] for version in document["removed"]] == ["lenet5:v2"]


def test_gc_says_what_it_will_remove(filled: Registry, run: Run) -> None:
    run("rm", "lenet5:v1", "--yes")
    document = run("gc", "--dry-run", "--grace", 0, "--json").json
    assert set(document) == {
        *("packs", "manifests", "temporary", "bytes", "waiting", "waiting_bytes", "wait_seconds", "dry_run"),
    }
    assert (document["manifests"], document["dry_run"]) == (1, True)
    text = run("gc", "--dry-run", "--grace", 0).out
    assert text.startswith("would remove manifests/")
    assert "1 manifest" in text
    assert run("gc").out.endswith("wait for up to 60 min\n")
    assert "freed" in run("gc", "--grace", "0s").out
    assert run("gc", "--grace", "0", "--json").json["manifests"] == 0
    assert run("gc", "--grace", "soon").status == 2


def test_verify_ends_with_1_when_something_is_damaged(filled: Registry, run: Run) -> None:
    done = run("verify")
    assert done.status == 0
    assert done.out.endswith("in 5 packs: OK\n")
    (tensor,) = (t for t in filled["lenet5:v2"].parameters() if t[0] == "model/fc.weight")
    location = filled.catalog.locate([tensor[3]])[tensor[3]]
    path = filled.store.pack_path(location.pack)
    data = bytearray(path.read_bytes())
    data[location.start] ^= 1
    path.chmod(0o644)
    path.write_bytes(data)
    done = run("verify")
    assert done.status == 1
    assert done.err.startswith("model/fc.weight: ")
    assert "(needed by lenet5:v2)" in done.err
    assert run("verify", "lenet5:v1").status == 0
    document = run("verify", "lenet5:v2", "--json")
    assert document.status == 1
    assert document.json["problems"][0]["checkpoints"] == ["lenet5:v2"]


def test_rebuild_brings_a_lost_catalog_back(filled: Registry, run: Run) -> None:
    before = run("ls", "lenet5").out
    filled.catalog.close()
    (filled.root / "catalog.sqlite").unlink()
    assert run("ls", "lenet5").out == before  # It is made anew by whoever finds it missing.
    assert run("rebuild").out == "rebuilt: 2 models, 5 versions, 5 packs\n"
    assert run("ls", "lenet5").out == before
    assert run("rebuild", "--json").json["versions"] == 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["show", "lenet6"], "there is no model 'lenet6'\nhint:  did you mean 'lenet5'?"),
        (["show", "lenet5:v9"], "lenet5 has no version v9\nhint:  its newest are v4, v3, v2, v1"),
        (["show", "lenet5@prod"], "lenet5 has no alias 'prod'\nhint:  did you mean 'production'?"),
        (["show", "lenet5:3"], "'lenet5:3': a version is written as v and its number, such as lenet5:v3"),
        (["show", "a/b"], "'a/b' is a run or a path"),
        (["show", "\x1b[31mx"], r"'\x1b[31mx' cannot be the name of a model"),
        (["ls", "x" * 5_000], "cannot be the name of a model"),
        (["tag", "lenet5", "a b"], "'a b' cannot be the name of a tag"),
    ],
)
def test_bad_input_gets_one_clear_line(
    filled: Registry, run: Run, arguments: list[str], message: str
) -> None:
    done = run(*arguments)
    assert done.status == 1
    assert message in done.err
    assert done.err.startswith("error: ")
    assert done.err.count("\n") <= 2
    assert len(done.err) < 400
    assert done.out == ""


def test_a_registry_that_is_not_there_is_not_made(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("REGISTRY_ROOT", raising=False)
    monkeypatch.chdir(tmp_path)
    for arguments in (["--root", "r", "ls"], ["ls", "--root", "r"]):
        assert (
            run(*arguments).err
            == "error: there is no registry at r\nhint:  make one with: registry --root r init\n"
        )
    assert list(tmp_path.iterdir()) == []


def test_wrong_usage_ends_with_2(filled: Registry, run: Run) -> None:
    for arguments in (["nothing"], ["show"], ["ls", "--limit", "-1"], ["show", "--what"], ["import", "x"]):
        done = run(*arguments)
        assert done.status == 2
        assert done.err.startswith("error: ")
        assert "\nhint:  " in done.err


def script(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([SCRIPT, *arguments], capture_output=True, text=True, check=False, **options)


def test_the_installed_command_prints_a_traceback_only_on_request(filled: Registry) -> None:
    done = script("show", "nothing")
    assert (done.returncode, done.stdout, done.stderr) == (
        1,
        "",
        "error: there is no model 'nothing'\nhint:  there are lenet5, resnet\n",
    )
    for arguments in (["--debug", "show", "nothing"], ["show", "nothing", "--debug"]):
        done = script(*arguments)
        assert done.returncode == 1
        assert "Traceback" in done.stderr
    assert script("--version").stdout.startswith("torch-registry, version ")


def test_a_closed_pipe_is_quiet(filled: Registry) -> None:
    command = f"{SCRIPT} list lenet5 --json | head -c 1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("{", "")


def test_rm_on_a_terminal_asks_before_it_removes(filled: Registry) -> None:
    shown = on_a_terminal("rm", "lenet5:v1", typed="n\n")
    assert shown.status == 1
    assert "Remove 1 version?" in shown.text
    assert "nothing was removed" in shown.text
    assert on_a_terminal("rm", "lenet5:v1", typed="y\n").status == 0
    assert script("ls", "lenet5", "--json").stdout.count('"name": "lenet5:v1"') == 0


def test_long_work_shows_a_bar_after_a_second_on_a_terminal(
    filled: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    from registry.cli import output

    class Terminal:
        def isatty(self) -> bool:
            return True

        def __getattr__(self, name: str) -> Any:
            return getattr(sys.__stderr__, name)

    shown: list[tuple[int, str]] = []

    class Bar:
        def __enter__(self) -> Bar:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def add_task(self, label: str, total: int) -> int:
            return 0

        def update(self, task: int, completed: int, total: int, description: str) -> None:
            shown.append((completed, description))

    clock = iter([0.0, 0.5, 1.5, 2.5, 3.5])
    monkeypatch.setattr(output, "_bar", Bar)
    monkeypatch.setattr(sys, "stderr", Terminal())
    # The module's own clock: threads of other tests ask the real one.
    monkeypatch.setattr(output, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    with output.progress_bar("working") as report:
        report(0, 3)
        report(1, 3)
        report(2, 3, 700_000)
    assert shown == [(1, "working"), (2, "working, 700 kB saved")]


def test_loading_from_the_registry_that_commands_filled(filled: Registry, run: Run) -> None:
    run("tag", "lenet5:v4", "kept")
    assert torch.equal(filled["lenet5:v4"].state_dict()["fc.weight"], torch.full((10, 4), 4.0))


@pytest.mark.parametrize(
    ("where", "told"),
    [
        (">&-", "error: done, but standard output is closed, so nothing was shown\n"),
        (">/dev/full", "error: cannot write to standard output: No space left on device\n"),
    ],
)
@pytest.mark.parametrize("command", ["ls", "status --json", "--help"])
def test_an_output_that_takes_nothing_is_one_line(
    filled: Registry, command: str, where: str, told: str
) -> None:
    program = "import sys; sys.argv[0] = 'registry'; from registry.cli import main; main()"
    done = subprocess.run(
        ["sh", "-c", f'"$0" -c "{program}" {command} {where}', sys.executable],
        env={**os.environ, "REGISTRY_ROOT": str(filled.root)},
        stderr=subprocess.PIPE,
        text=True,
    )
    assert (done.returncode, done.stderr) == (1, told)


@pytest.mark.parametrize("command", ["verify", "gc", "compact", "export net x.pt", "ls"])
def test_a_command_works_without_an_error_stream(filled: Registry, command: str, tmp_path: Path) -> None:
    program = "import sys; sys.argv[0] = 'registry'; from registry.cli import main; main()"
    command = command.replace("net", "lenet5:v4")
    done = subprocess.run(
        ["sh", "-c", f'"$0" -c "{program}" {command} 2>&-', sys.executable],
        env={**os.environ, "REGISTRY_ROOT": str(filled.root)},
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert done.returncode == 0
    assert done.stdout


def test_a_command_line_without_words_is_answered(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where a program calls the commands, and its own words are none."""
    from registry.cli.app import app  # noqa: F401  # which says what is a command
    from registry.cli.output import with_root

    monkeypatch.setattr(sys, "argv", ["program"])
    assert with_root("make one with: registry init") == "make one with: registry init"
    monkeypatch.setattr(sys, "argv", ["program", "--root"])
    assert with_root("make one with: registry init") == "make one with: registry init"
    assert "Usage:" in run().out + run().err


@pytest.mark.damages
def test_repair_puts_back_what_verify_has_found(filled: Registry, run: Run, tmp_path: Path) -> None:
    backup = tmp_path / "backup"
    filled.catalog.close()
    shutil.copytree(filled.root, backup)
    assert run("repair", "--from", backup).out == "nothing is damaged\n"
    for root, count in ((filled.root, 3), (backup, 1)):
        for path in sorted(root.glob("packs/*/*"))[:count]:
            path.unlink()
    verified = run("verify")
    assert verified.status == 1
    assert verified.out.endswith("puts back what it has: registry repair --from PLACE\n")
    would = run("repair", "--from", backup, "--dry-run")
    assert (would.status, would.out[:14]) == (1, "would put back")
    done = run("repair", "--from", backup)
    assert done.status == 1
    assert ": 2 packs" in done.out
    assert f"neither {filled.root} nor {backup} has it whole (needed by " in done.err
    document = run("repair", "--from", backup, "--json")
    assert (document.status, document.json["packs"], document.json["dry_run"]) == (1, 0, False)
    assert document.json["problems"][0]["checkpoints"]
    missing = run("repair", "--from", tmp_path / "nowhere")
    assert (missing.status, missing.err.count("\n")) == (1, 2)


def test_a_card_is_printed_or_written(filled: Registry, run: Run, tmp_path: Path) -> None:
    assert run("card", "lenet5:v3").out.startswith("# Model card of lenet5:v3\n")
    for name, begins in (("card.md", "# Model card"), ("card.html", "<!DOCTYPE html>")):
        path = tmp_path / name
        assert run("card", "lenet5:v3", "-o", path).out == f"wrote {path}\n"
        assert path.read_text().startswith(begins)
    refused = run("card", "lenet5:v3", "-o", tmp_path / "card.docx")
    assert refused.status == 1
    assert "hint:  give one of these endings" in refused.err


def test_show_measures_the_tensors(filled: Registry, run: Run) -> None:
    lines = run("show", "lenet5:v3", "--stats").out.splitlines()
    assert any(line.startswith("PATH") and "NORM" in line and "ZEROS" in line for line in lines)
    document = run("show", "lenet5:v3", "--stats", "--json").json
    assert {one["path"] for one in document["statistics"]} == {
        path for path, *_ in filled["lenet5:v3"].parameters()
    }
    assert all(sum(one["histogram"]) == one["elements"] for one in document["statistics"])
