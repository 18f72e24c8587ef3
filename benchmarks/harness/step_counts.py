"""Counts what the steps of step_speed.py launch and compute at true size, without a GPU: its --count."""

from typing import Any
from unittest import mock

import torch

import dkv
from benchmarks.harness import common
from benchmarks.harness.common import say
from benchmarks.harness.fake_gpu import counted, fake_gpu, fake_model
from benchmarks.harness.launches import OnlyOnTheDevice
from benchmarks.harness.models import BLOCK, FAMILIES, TRUE_SIZE, make_model, tiny
from benchmarks.harness.step_points import DECODE, FUSED, LIBRARY, StepPoint, Way, at_step, fake_at_step
from dkv import run
from dkv.generation import prepare
from dkv.kernels import configs
from dkv.rooms import TILE, round_up

GENERATED = 128
POLICIES = {
    "Decode(8)": DECODE,
    'Decode(8, scope="block")': dkv.Decode(8, scope="block"),
    "DualCache()": dkv.DualCache(),
}
# (family, batch, length, policy) of whole runs, one token a step
SHAPES = ((1, 300), (3, 600), (4, 320), (4, 384), (6, 300), (7, 290), (8, 160), (1, 640), (4, 640), (8, 640))
RUNS = (
    *((family, *shape, "Decode(8)") for family in FAMILIES for shape in SHAPES),
    ("LLaDA", 32, 384, 'Decode(8, scope="block")'),
    ("Dream", 8, 640, "DualCache()"),
    ("Dream", 32, 384, "DualCache()"),
)


def tiny_model(family: str) -> torch.nn.Module:
    return make_model(tiny(family), seed=0, dtype=torch.float32, device="cpu")


@torch.no_grad()
def count_point(point: StepPoint, way: Way = LIBRARY) -> dict[str, Any]:
    """Counts what the step of a point launches and computes at true size."""
    need = run.needed(at_step(tiny_model(point.family), point).sizes.tolist())
    with fake_gpu() as launches:
        current, steps = fake_at_step(fake_model(TRUE_SIZE[point.family][1]), point)
        current.steps = steps
        room = current.next_room()
        with way.of(current):
            # the first step makes what all later ones use
            current.compute(room)
            launches.clear()
            with OnlyOnTheDevice():
                current.compute(room)
    (head,) = (launch.arguments for launch in launches if launch.name == "lm_head")
    ours = [launch.arguments["rows"] for launch in launches if launch.name.startswith("linear_")]
    rows = max(ours or (launch.grid[0] for launch in launches if launch.name == "add_rms_norm"))
    purposes = counted(launches)
    return {
        "point": str(point),
        "way": way.name,
        "launches": len(launches),
        "bookkeeping": purposes.get("bookkeeping", 0),
        "rows_needed": round_up(need.positions, TILE),
        "rows_computed": rows,
        "candidates_needed": need.candidates,
        "candidates_computed": round_up(need.candidates, head["BLOCK_R"]),
        "purposes": purposes,
    }


@torch.no_grad()
def count_run(family: str, batch: int, length: int, policy: str) -> dict[str, Any]:
    """Counts the rows of a whole run: those that its steps need, and those that they compute on a GPU."""
    prompt = torch.randint(0, 50, (batch, length - GENERATED), generator=torch.Generator().manual_seed(0))
    blocks = family == "LLaDA" or POLICIES[policy].needs_blocks
    options = {"gen_length": GENERATED, "block_length": BLOCK if blocks else GENERATED, "policy": POLICIES[policy]}
    rows, graphs = dict.fromkeys(("needed_full", "computed_full", "needed_cached", "computed_cached"), 0), set()
    with mock.patch.object(run, "reads_sizes", lambda device: False):
        current = prepare(tiny_model(family), prompt, **options)
        while current.running():
            need, room = run.needed(current.sizes.tolist()), current.next_room()
            kind = "full" if need.positions == batch * length else "cached"
            rows[f"needed_{kind}"] += round_up(need.positions, TILE)
            rows[f"computed_{kind}"] += room.positions
            if current.rooms.records(room):
                graphs.add(room)
            current.step()
        current.finish()
    name = f"{family}:{batch}:{length - GENERATED}+{GENERATED}"
    return {"run": name, "policy": policy, **{f"rows_{k}": n for k, n in rows.items()}, "graphs": len(graphs)}


def count(points: list[StepPoint]) -> dict[str, list]:
    """Prints the counts of points and of whole runs; returns them."""
    header = f"{'point':24}{'way':10}{'launches':>9}{'bookkeeping':>13}{'rows':>7}{'needed':>8}"
    say(f"{header}{'candidates':>12}{'needed':>8}  what")
    found = {"points": [], "runs": []}
    for point in common.progress(points, "points"):
        rows = [count_point(point)]
        if rows[0]["rows_computed"] <= configs.MAX_PRODUCT_ROWS:
            rows.append(count_point(point, FUSED))
        found["points"] += rows
        for row in rows:
            launched = ", ".join(f"{n} {purpose}" for purpose, n in row["purposes"].items() if purpose != "bookkeeping")
            say(
                f"{row['point']:24}{row['way']:10}{row['launches']:9}{row['bookkeeping']:13}{row['rows_computed']:7}"
                f"{row['rows_needed']:8}{row['candidates_computed']:12}{row['candidates_needed']:8}  {launched}"
            )
    say(f"\n{'run':20}{'full':>8}{'needed':>8}{'ratio':>7}{'cached':>8}{'needed':>8}{'ratio':>7}{'graphs':>8}  policy")
    for case in common.progress(RUNS, "runs"):
        row = count_run(*case)
        found["runs"].append(row)
        cells = ""
        for kind in ("full", "cached"):
            computed, needed = row[f"rows_computed_{kind}"], row[f"rows_needed_{kind}"]
            cells += f"{computed:8}{needed:8}{computed / needed if needed else 1:7.3f}"
        say(f"{row['run']:20}{cells}{row['graphs']:8}  {row['policy']}")
    return found
