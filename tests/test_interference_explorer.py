"""The interference atlas against the library's scores and literal float64 formulas, principal angles against constructions, and the explorer without a browser."""
import math

import pytest
import torch

pytest.importorskip("ipywidgets")
from conftest import make_vectors
from explorer_steps import expect_live

from tsv_nb.explore import interference_explorer as module
from tsv_nb.explore.interference_explorer import collision, interference_atlas, interference_explorer, principal_angles, random_angles, shared_directions
from tsv_nb.interference import NORMS, interference_by_layer, pairwise_interference

SHAPES = {"blocks.0.w": (20, 12), "blocks.0.b": (20,), "blocks.1.w": (12, 30), "head.weight": (5, 9)}


@pytest.fixture
def many(g): return make_vectors(g, 4, SHAPES)


def basis(d, k, g): return torch.linalg.qr(torch.randn(d, k, generator=g, dtype=torch.float64)).Q


@pytest.mark.parametrize("degrees", [(0., 0., 0.), (5., 40., 89.), (90., 90., 90.)])
def test_angles_are_those_that_were_built_in(g, degrees):
    "B is A turned by a given angle in each of three planes, then both bases are mixed: mixing changes no subspace."
    Q, mix = basis(40, 6, g), [basis(3, 3, g) for _ in range(2)]
    t = torch.tensor(degrees, dtype=torch.float64).deg2rad()
    A, B = Q[:, :3] @ mix[0], (Q[:, :3] * t.cos() + Q[:, 3:] * t.sin()) @ mix[1]
    got = principal_angles(A, B)
    assert torch.allclose(got, torch.tensor(degrees, dtype=torch.float64), atol=1e-5)
    assert shared_directions(got).item() == pytest.approx(sum(math.cos(math.radians(x))**2 for x in degrees), abs=1e-9)
    assert torch.allclose(shared_directions(got), (A.T @ B).square().sum()) # the same without angles


@pytest.mark.parametrize("d, k, l", [(30, 3, 3), (30, 3, 20), (12, 12, 5), (7, 7, 7), (9, 1, 1)])
def test_random_subspaces_share_what_the_formula_says(d, k, l):
    angles = random_angles(d, k, l, draws=400)
    assert angles.shape == (400, min(k, l)) and (angles.diff(dim=1) >= 0).all() and angles.min() >= 0 and angles.max() <= 90
    assert shared_directions(angles).mean().item() == pytest.approx(k * l / d, rel=.12)
    assert torch.equal(random_angles.__wrapped__(d, k, l, 400), angles)
    if k + l > d: assert torch.allclose(angles[:, :k + l - d], torch.zeros(1, dtype=torch.float64), atol=1e-4) # they must meet


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("rank", [1, 3, 12])
def test_scores_are_those_of_the_library(many, norm, rank):
    atlas = interference_atlas(many, ranks=[rank, 2], norm=norm)
    assert atlas.layers == ["blocks.0.w", "blocks.1.w", "head.weight"] and atlas.norm == norm and list(atlas.scores) == sorted({rank, 2})
    assert torch.allclose(atlas.scores[rank].sum(0), pairwise_interference(many, rank, norm), rtol=1e-5)
    pair = interference_by_layer({t: many[t] for t in ("task1", "task3")}, rank, norm)
    assert torch.allclose(atlas.scores[rank][:, 1, 3], torch.tensor(list(pair.values())).double(), rtol=1e-5)
    assert torch.equal(atlas.scores[rank], atlas.scores[rank].mT) and not atlas.scores[rank].diagonal(dim1=1, dim2=2).any()


def test_a_cell_is_the_literal_formula(many):
    c = collision(interference_atlas(many, ranks=[4]), "blocks.1.w", "task0", "task2", 4)
    (Ua, Sa, Va), (Ub, Sb, Vb) = ((u[:, :4], s[:4], vh[:4].T) for u, s, vh in (torch.linalg.svd(many[t]["blocks.1.w"].double(), full_matrices=False) for t in ("task0", "task2")))
    U, S, V, eye = torch.cat([Ua, Ub], 1), torch.cat([Sa, Sb]).diag(), torch.cat([Va, Vb], 1), torch.eye(8)
    assert c.score == pytest.approx(((U.T @ U - eye) @ S @ (V.T @ V - eye)).abs().sum().item(), rel=1e-5)
    for side, (A, B), d in (("output", (Ua, Ub), 12), ("input", (Va, Vb), 30)):
        assert torch.allclose(c.angles[side].deg2rad().cos(), torch.linalg.svdvals(A.T @ B), atol=1e-5) and c.expected[side] == 16 / d
        assert c.chance[side].shape == (8, 4)


def test_default_ranks_are_powers_of_two_up_to_the_share(g):
    def ranks(n, shape): return list(interference_atlas(make_vectors(g, n, {"w": shape})).scores)
    assert ranks(2, (40, 30)) == [1, 2, 4, 8, 15] and ranks(2, (16, 60)) == [1, 2, 4, 8] and ranks(4, (3, 9)) == [1]


def test_layers_and_tasks_that_did_not_move(many, g):
    "A layer that no task has moved is not on the map; a task that has not moved in a layer, or of low rank there, has fewer directions."
    u, v = torch.randn(12, 2, generator=g), torch.randn(2, 30, generator=g)
    for t, vector in many.items(): vector["blocks.0.w"] = torch.zeros(20, 12)
    many["task1"]["blocks.1.w"], many["task2"]["blocks.1.w"] = torch.zeros(12, 30), u @ v
    atlas = interference_atlas(many, ranks=[4])
    assert atlas.layers == ["blocks.1.w", "head.weight"] and (atlas.scores[4][0, 1] == 0).all() and atlas.scores[4][0, 0, 2] > 0
    c = collision(atlas, "blocks.1.w", "task0", "task2", 4)
    assert [len(c.angles[s]) for s in ("output", "input")] == [2, 2] and c.expected == {"output": 8 / 12, "input": 8 / 30} and c.chance["input"].shape == (8, 2)
    empty = collision(atlas, "blocks.1.w", "task0", "task1", 4)
    assert not len(empty.angles["output"]) and empty.score == 0
    e = interference_explorer(atlas)
    e.move(layer="blocks.1.w", task="task0", other="task1")
    assert e.text["shared, output side"] == "0.0 of 0 (chance 0.0)"


def test_every_control_changes_picture_and_numbers(many):
    e = interference_explorer(interference_atlas(many, ranks=[1, 2, 4]))
    start = e.result
    worst = start.atlas.scores[4].argmax().item()
    assert (start.atlas.layers.index(start.layer), start.task, start.other) == (worst // 16, f"task{worst // 4 % 4}", f"task{worst % 4}") # it opens where they collide most
    free = next(t for t in start.atlas.tasks if t not in (start.task, start.other))
    for move in (dict(rank=4), dict(layer=next(o for o in start.atlas.layers if o != start.layer)), dict(task=free), dict(other=start.task), dict(rank=1)):
        before = e.png, e.text
        e.move(**move)
        assert e.png != before[0] and e.text != before[1], move
    assert e.text["STI (entrywise norm)"] == f"{e.result.score:.3g}"


def test_place_and_strongest_collision(many):
    atlas = interference_atlas(many, ranks=[3])
    e = interference_explorer(atlas)
    assert e.text["place in the map"] == "1 of 18" # 3 layers, 6 pairs
    i, j = torch.triu_indices(4, 4, 1)
    cells = sorted(((s[a, b].item(), layer, a, b) for layer, s in zip(atlas.layers, atlas.scores[3]) for a, b in zip(i, j)), reverse=True)
    for place, (score, layer, a, b) in enumerate(cells, 1):
        text = e.move(layer=layer, task=f"task{a}", other=f"task{b}")
        assert text["place in the map"] == f"{place} of 18" and text["strongest collision"].endswith(f"{cells[0][0]:.3g}")
    assert e.move(task="task1", other="task1")["place in the map"] == "none (a task and itself)"


def test_frames_stand_around_the_chosen_cell(many):
    "Mutation guard for rows and columns: the framed number is the score."
    from matplotlib.figure import Figure
    atlas = interference_atlas(many, ranks=[3])
    c = collision(atlas, "blocks.1.w", "task3", "task1", 3)
    axes = module._scene(Figure(), c)
    module._marks(axes, c)
    for name in ("map", "pairs"):
        corner, image = axes[name].patches[0].get_xy(), axes[name].images[0].get_array()
        assert image[round(corner[1] + .5), round(corner[0] + .5)] == pytest.approx(c.score)
        assert (image.shape == (4, 3) if name == "map" else image.shape == (4, 4))


def test_steps_stay_within_their_budget(g):
    "On task vectors of the offline world's sizes."
    e = interference_explorer(make_vectors(g, 8, {f"{i}.{n}": s for i in range(2) for n, s in dict(c_fc=(1792, 448), out=(448, 448)).items()}))
    atlas = e.result.atlas
    e.move(task=atlas.tasks[0], other=atlas.tasks[1], layer=atlas.layers[-1], rank=max(atlas.scores))
    expect_live(e, {"layer": atlas.layers, "task": atlas.tasks[1:], "other": atlas.tasks[2:], "rank": list(atlas.scores)})


def test_names_of_layers():
    assert [module._short(o) for o in ("visual.transformer.resblocks.11.attn.in_proj_weight", "transformer.resblocks.0.mlp.c_fc.weight", "visual.proj", "positional_embedding", "w")] == ["11.attn.in_proj", "0.mlp.c_fc", "proj", "position", "w"]


def test_fifty_layers_have_readable_ticks(g):
    e = interference_explorer(make_vectors(g, 2, {f"blocks.{i}.w.weight": (4, 5) for i in range(50)}))
    assert len(e.picture.axes["map"].get_xticks()) == 17 and e.picture.axes["map"].get_xlim() == (-.5, 49.5)


@pytest.mark.parametrize("change, message", [
    (dict(vectors={"a": {"w": torch.ones(3, 3)}}), "one task alone"), (dict(vectors=[{"b": torch.ones(3)}] * 2), "no matrix to decompose"), (dict(vectors=[{"w": torch.zeros(3, 3)}] * 2), "no matrix has moved"),
    (dict(ranks=[2, 0]), "rank must be at least 1"), (dict(norm="l1"), "known: 'entrywise'")])
def test_bad_input_is_named(many, change, message):
    with pytest.raises(ValueError, match=message): interference_atlas(**({"vectors": many} | change))
