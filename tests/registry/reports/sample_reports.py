"""A report with every section that there is, a plan, and curves: made by hand, so that no engine changes them."""

from __future__ import annotations

import math

from registry.transfer.curves import Curve
from registry.transfer.matching import Category
from registry.transfer.plan import FrozenPart, Step, TransferPlan
from registry.transfer.report import (
    Count,
    DiffReport,
    FieldDifference,
    LayerDifference,
    ModuleChange,
    SideInfo,
    ValueChange,
)
from registry.transfer.report_rows import Row

PLAN = TransferPlan(
    schema=1,
    source="old:v3",
    source_digest="a" * 64,
    target="new|net",
    target_digest="b" * 64,
    steps=(
        Step(action="copy", target="stem.weight", source="conv1.weight", why="RENAMED", elements=1000),
        Step(action="copy", target="layers.0.weight", source="layers.0.weight", why="MATCH", elements=4000),
        Step(
            action="copy",
            target="head.weight",
            source="fc.weight",
            why="expected",
            adapter="channels-sum",
            elements=500,
        ),
        Step(action="keep", target="head.bias", why="new", elements=10),
        Step(action="unused", source="aux.weight", why="unused", elements=77),
    ),
    freeze=("stem.*",),
    notes=("head.weight: its channels are summed",),
)


def _row(category: Category, name: str, *, equal: bool | None = None, **more: object) -> Row:
    given = {"a": name, "b": name, "shape_a": (4, 4), "shape_b": (4, 4), "dtype_a": "float32"}
    return Row.model_validate(
        given | {"dtype_b": "float32", "kind": "parameter", "category": category, "equal": equal} | more
    )


ROWS = (
    _row(Category.RENAMED, "stem.weight", a="conv1.weight", equal=True),
    *(_row(Category.MATCH, f"layers.{i}.weight", equal=i == 1) for i in range(4)),
    _row(Category.MATCH, "layers.5.weight", equal=False),
    _row(Category.CAST, "layers.5.bias", shape_a=(4,), shape_b=(4,), dtype_b="bfloat16"),
    _row(Category.SHAPE, "head.weight", shape_b=(10, 4), note="rows 4 -> 10"),
    _row(Category.POSITIONAL, "blocks.0.scale", shape_a=(), shape_b=(), note="blocks has 3 layers, 4 there"),
    _row(Category.ONLY_A, "aux|x.<b>*w*", b=None, shape_b=None, dtype_b=None),
    _row(Category.ONLY_B, "top\x1b[31m", a=None, shape_a=None, dtype_a=None, kind="buffer"),
)

REPORT = DiffReport(
    schema=1,
    a=SideInfo(
        label="old:v3", names=10, elements=200, parameters=9, buffers=1, structure="s", content="c" * 64
    ),
    b=SideInfo(
        label="new|net", names=10, elements=300, parameters=10, buffers=0, structure="t", content=None
    ),
    verdict="COMPATIBLE",
    exceptions=4,
    loadable=Count(names=7, elements=1234),
    target=Count(names=9, elements=1235),
    counts={
        Category.MATCH: Count(names=5, elements=80),
        Category.RENAMED: Count(names=1, elements=16),
        Category.CAST: Count(names=1, elements=4),
        Category.SHAPE: Count(names=1, elements=40),
        Category.POSITIONAL: Count(names=1, elements=1),
        Category.ONLY_A: Count(names=1, elements=16),
        Category.ONLY_B: Count(names=1, elements=1_234_567),
    },
    rows=ROWS,
    architecture=(
        LayerDifference(path="", a="Net", b="Other"),
        LayerDifference(path="drop", a="Dropout(p=0.5)", b=None),
    ),
    config=(FieldDifference(key="lr", a=0.1, b=0.0123456789), FieldDifference(key="name", a="x|y", b=None)),
    metrics=(FieldDifference(key="accuracy", a=0.5, b=0.75),),
    changes=(
        ValueChange(
            name="layers.0.weight",
            norm=1.5,
            relative=0.25,
            cosine=0.99,
            largest=0.5,
            changed=0.5,
            nonfinite_a=0,
            nonfinite_b=0,
        ),
        ValueChange(
            name="layers.5.weight",
            norm=12345.6,
            relative=math.inf,
            cosine=None,
            largest=3.0,
            changed=1.0,
            nonfinite_a=0,
            nonfinite_b=2,
        ),
    ),
    modules=(
        ModuleChange(module="layers.0", tensors=1, norm=1.5, relative=0.25),
        ModuleChange(module="", tensors=1, norm=1.0, relative=0.125),
    ),
    plan=PLAN,
    frozen=(FrozenPart(where="old:v3", names=("stem.weight",), elements=16, trainable=184),),
    suggestions=("--rename 'conv1.*=stem.*' pairs 1 name more",),
    warnings=("1 tensor agrees but may be of another layer", "neither was trained from the other"),
    command="registry diff old:v3 'new|net' --values",
)

SAME = REPORT.model_copy(
    update={
        "verdict": "IDENTICAL",
        "exceptions": 0,
        "rows": ROWS[2:3],
        "counts": {Category.MATCH: Count(names=1, elements=16)},
        "architecture": (),
        "config": (),
        "metrics": (),
        "changes": (),
        "modules": (),
        "plan": None,
        "frozen": (),
        "suggestions": (),
        "warnings": (),
        "command": "",
    }
)

CURVES = [Curve("lenet5", {1: 0.9, 2: 0.5, 4: 0.25}), Curve("lenet6|b", {1: 0.8, 2: math.nan, 3: 0.3})]


def main() -> None:
    """Write the golden files anew; look at what has changed."""
    from pathlib import Path

    from test_reports import BLOCKS, PARTS

    for name, blocks in BLOCKS.items():
        for form, render in PARTS.items():
            (Path(__file__).parent / "golden" / f"{name}.{form}").write_text(render(blocks))


if __name__ == "__main__":
    main()
