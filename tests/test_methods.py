"""What every merging method of the table has to keep: the same promises, tested for each of them."""
import pytest
import torch

from tsv_nb.methods import MERGE_METHODS

SHAPES = {"block.weight": (12, 20), "head.weight": (16, 9), "conv.weight": (4, 3, 2, 2), "bias": (12,), "scale": ()}
METHODS = pytest.mark.parametrize("method", list(MERGE_METHODS))
SPECTRAL = ["tsv", "isotropic", "boosted", "core_space"] # Iso-CTS and calibration look at the left singular vectors only


def tasks(n=3, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    return {f"task{t}": {k: torch.randn(s, generator=g, dtype=torch.float64).to(dtype) for k, s in SHAPES.items()} for t in range(n)}


def close(a, b, tol=1e-6):
    assert a.keys() == b.keys()
    for k in a: assert (a[k].double() - b[k].double()).norm() <= tol * (b[k].double().norm() + 1e-9), k


class OnDemand(dict):
    "A task vector whose entries are made anew each time, as when they are read from a file."
    def __getitem__(self, name): return super().__getitem__(name).clone()


@METHODS
def test_returns_a_task_vector_and_leaves_its_inputs_alone(method):
    vectors = tasks(dtype=torch.float32)
    before = {t: {k: x.clone() for k, x in v.items()} for t, v in vectors.items()}
    merged = MERGE_METHODS[method](vectors)
    assert {k: (x.shape, x.dtype) for k, x in merged.items()} == {k: (torch.Size(s), torch.float32) for k, s in SHAPES.items()}
    assert list(merged) == list(SHAPES)
    for t, v in before.items():
        for k, x in v.items(): assert torch.equal(x, vectors[t][k]), (t, k)
    for k, x in merged.items():
        assert x.isfinite().all(), k
        assert all(x.data_ptr() != v[k].data_ptr() for v in vectors.values()), k


@METHODS
def test_entries_may_be_read_on_demand(method):
    vectors = tasks()
    close(MERGE_METHODS[method]({t: OnDemand(v) for t, v in vectors.items()}), MERGE_METHODS[method](vectors), 0)


@METHODS
def test_the_promise_about_a_single_task_is_true(method):
    alone = tasks(1)
    merged, vector = MERGE_METHODS[method](alone), alone["task0"]
    difference = max(((merged[k] - vector[k]).norm() / vector[k].norm()).item() for k in vector)
    if MERGE_METHODS[method].exact_single: assert difference < 1e-6
    else: assert difference > 1e-2, "it keeps the promise after all: say so in the table"


@METHODS
def test_the_order_of_tasks_does_not_matter(method):
    vectors = tasks(4)
    close(MERGE_METHODS[method](dict(reversed(vectors.items()))), MERGE_METHODS[method](vectors))


@METHODS
def test_the_order_of_entries_does_not_matter(method):
    vectors = tasks()
    turned = {t: dict(reversed(v.items())) for t, v in vectors.items()}
    close(MERGE_METHODS[method](turned), MERGE_METHODS[method](vectors), 1e-12)


@METHODS
@pytest.mark.parametrize("factor", [4., -.5])
def test_scaled_tasks_give_a_scaled_result(method, factor):
    vectors = tasks()
    scaled = {t: {k: factor * x for k, x in v.items()} for t, v in vectors.items()}
    close(MERGE_METHODS[method](scaled), {k: factor * x for k, x in MERGE_METHODS[method](vectors).items()})


@pytest.mark.parametrize("method", SPECTRAL)
def test_transposed_matrices_give_the_transposed_result(method):
    vectors = tasks()
    turned = {t: {k: x.T if x.ndim == 2 else x for k, x in v.items()} for t, v in vectors.items()}
    close(MERGE_METHODS[method](turned), {k: x.T if x.ndim == 2 else x for k, x in MERGE_METHODS[method](vectors).items()})


@METHODS
def test_tasks_that_did_not_move_give_nothing(method):
    zeros = {t: {k: torch.zeros_like(x) for k, x in v.items()} for t, v in tasks().items()}
    for k, x in MERGE_METHODS[method](zeros).items(): assert not x.any(), k


@METHODS
def test_half_precision_is_computed_in_float32(method):
    low = tasks(dtype=torch.float16)
    full = {t: {k: x.float() for k, x in v.items()} for t, v in low.items()}
    close(MERGE_METHODS[method](low), MERGE_METHODS[method](full), 2e-3)


@METHODS
def test_a_value_that_is_not_finite_is_named(method):
    vectors = tasks()
    vectors["task1"]["head.weight"][0, 0] = torch.nan
    if method == "zero_shot": return # reads no values
    with pytest.raises(ValueError, match="task1.*head.weight"): MERGE_METHODS[method](vectors)


@METHODS
def test_tasks_that_do_not_fit_together_are_named(method):
    vectors = tasks()
    vectors["task2"]["bias"] = torch.zeros(13, dtype=torch.float64)
    with pytest.raises(ValueError, match="task2.*bias"): MERGE_METHODS[method](vectors)
    del vectors["task2"]["bias"]
    with pytest.raises(KeyError, match="bias"): MERGE_METHODS[method](vectors)
    with pytest.raises(ValueError, match="at least one"): MERGE_METHODS[method]({})


@METHODS
def test_an_option_that_does_not_exist_is_an_error(method):
    with pytest.raises((TypeError, ValueError), match="sharpness"): MERGE_METHODS[method](tasks(), sharpness=3)


def test_each_row_says_where_it_comes_from():
    for name, method in MERGE_METHODS.items():
        assert method.name == name and "arXiv" in method.source and 0 < method.alpha <= method.alpha_max, name
    assert len({m.title for m in MERGE_METHODS.values()}) == len(MERGE_METHODS)


def test_an_unknown_method_is_answered_with_the_known_ones():
    with pytest.raises(ValueError, match="'task_arithmatic'.*known: zero_shot.*Did you mean 'task_arithmetic'"): MERGE_METHODS["task_arithmatic"]


@METHODS
def test_a_result_that_does_not_fit_is_an_error_that_names_the_tensor(method):
    "Sums of large float16 numbers. Methods whose result is no larger than the tasks return it."
    vectors = {f"task{t}": {"w": torch.full((6, 5), 4e4).half(), "b": torch.full((6,), 4e4).half()} for t in range(3)}
    try: merged = MERGE_METHODS[method](vectors)
    except ValueError as e: assert "do not fit into torch.float16" in str(e) and ("'w'" in str(e) or "'b'" in str(e))
    else: assert all(torch.isfinite(x).all() for x in merged.values())
