import pytest
import torch

from tsv_nb import StateDictKeyError, apply_task_vector, is_matrix, task_arithmetic, task_vector, weight_average
from tsv_nb.task_vectors import named_vectors, task_weights


def state(g, dtype=torch.float32):
    return {"w": torch.randn(5, 4, generator=g).to(dtype), "b": torch.randn(5, generator=g).to(dtype), "ids": torch.arange(4), "mask": torch.ones(3, dtype=torch.bool)}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_round_trip(g, dtype):
    base, tuned = state(g, dtype), state(g, dtype)
    copies = [{k: v.clone() for k, v in d.items()} for d in (base, tuned)]
    tau = task_vector(base, tuned)
    assert set(tau) == {"w", "b"} and tau["w"].dtype == dtype
    back = apply_task_vector(base, tau)
    eps = torch.finfo(dtype).eps
    for k in base:
        assert back[k].dtype == base[k].dtype
        torch.testing.assert_close(back[k].double(), tuned[k].double(), rtol=2 * eps, atol=4 * eps)
    for d, copy in zip((base, tuned), copies): assert all(torch.equal(d[k], copy[k]) for k in d)


def test_half_precision_is_subtracted_in_float32():
    "Scaling before the sum in bfloat16 would round twice; the reference is float64."
    base, tau = {"w": torch.tensor([256.]).bfloat16()}, {"w": torch.tensor([1.]).bfloat16()}
    for alpha in (.3, 1.3, 2.7):
        want = torch.tensor([256. + alpha], dtype=torch.float64).bfloat16()
        assert torch.equal(apply_task_vector(base, tau, alpha)["w"], want)


def test_result_does_not_alias_the_base(g):
    base = state(g)
    out = apply_task_vector(base, task_vector(base, state(g)))
    out["ids"].zero_(); out["w"].zero_()
    assert base["ids"][-1] == 3 and base["w"].any()


def test_missing_and_unexpected_keys_are_listed_and_counted(g):
    base = {f"layer{i}.weight": torch.ones(2) for i in range(10)}
    with pytest.raises(StateDictKeyError) as e: task_vector(base, {"layer0.weight": torch.ones(2), "head": torch.ones(2)})
    assert "9 missing" in str(e.value) and "'layer1.weight'" in str(e.value) and "and 6 more" in str(e.value) and "1 unexpected ('head')" in str(e.value)
    assert isinstance(e.value, KeyError) and "\\n" not in str(e.value)


def test_shape_mismatch_names_both_shapes(g):
    with pytest.raises(ValueError, match=r"'w'.*\(5, 4\).*\(4, 5\)"): task_vector(state(g), state(g) | {"w": torch.ones(4, 5)})


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["pretrained", "finetuned"])
def test_not_finite_names_the_key_and_the_count(g, bad, where):
    base, tuned = state(g), state(g)
    broken = base if where == "pretrained" else tuned
    broken["w"][0, :2] = bad
    with pytest.raises(ValueError, match="'w' has 2 of 20 values"): task_vector(base, tuned)


def test_tasks_whose_keys_differ(g):
    a, b = {"w": torch.ones(2, 2)}, {"w": torch.ones(2, 2), "extra": torch.ones(1)}
    with pytest.raises(StateDictKeyError, match="task 'b' .compared with 'a'.*'extra'"): task_arithmetic({"a": a, "b": b})


@pytest.mark.parametrize("empty", [[], {}, ()])
def test_no_task(empty):
    with pytest.raises(ValueError, match="no task vector given"): weight_average(empty)


def test_a_single_state_dict_instead_of_several(g):
    with pytest.raises(TypeError, match="'w'.*expected a task vector"): named_vectors({"w": torch.ones(2)})


def test_what_is_not_a_state_dict(g):
    with pytest.raises(TypeError, match="got Linear; pass model.state_dict"): task_vector(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    with pytest.raises(TypeError, match="pass checkpoint.'state_dict'"): task_vector({"state_dict": state(g), "epoch": 1}, {"state_dict": state(g), "epoch": 2})
    with pytest.raises(ValueError, match="'w' is torch.float32 in one checkpoint and torch.int8"): task_vector(state(g), state(g) | {"w": torch.ones(5, 4, dtype=torch.int8)})
    with pytest.raises(ValueError, match="'ids' is torch.int64"): named_vectors([{"ids": torch.arange(3)}])
    with pytest.raises(ValueError, match="alpha must be a finite number"): apply_task_vector({"w": torch.ones(2)}, {"w": torch.ones(2)}, float("nan"))


def test_weights(vectors):
    assert task_weights(None, vectors) == [1., 1., 1.]
    with pytest.raises(ValueError, match="2 weights for 3 tasks"): task_weights([1, 2], vectors)
    with pytest.raises(StateDictKeyError, match="'task2'"): task_weights({"task0": 1, "task1": 1, "tsk2": 1}, vectors)


def test_average_is_arithmetic_at_one_over_T(g, vectors):
    base = {k: torch.randn(v.shape, generator=g) for k, v in vectors["task0"].items()}
    a, b = apply_task_vector(base, weight_average(vectors)), apply_task_vector(base, task_arithmetic(vectors), 1 / 3)
    for k in base: torch.testing.assert_close(a[k], b[k])
    want = sum(v["w"].double() for v in vectors.values()) / 3 + base["w"].double()
    torch.testing.assert_close(a["w"].double(), want, rtol=1e-6, atol=1e-6)


def test_is_matrix():
    assert is_matrix("a.weight", torch.ones(2, 2)) and is_matrix("text_projection", torch.ones(2, 2), exclude=())
    assert not is_matrix("conv1.weight", torch.ones(2, 3, 4, 4)) and not is_matrix("model.text_projection", torch.ones(2, 2))


def test_what_does_not_fit_into_its_type_is_an_error():
    "60,000 and -60,000 are float16 numbers; their difference is not, and would be infinite without a word."
    low, high = ({"w": torch.tensor([1., x]).half()} for x in (-6e4, 6e4))
    with pytest.raises(ValueError, match="difference of tensor 'w': 1 of 2 values do not fit into torch.float16"): task_vector(low, high)
    with pytest.raises(ValueError, match="result 'w': 1 of 2 values do not fit into torch.float16"): apply_task_vector(high, high)
    with pytest.raises(ValueError, match="result 'w': 1 of 1 values do not fit"): apply_task_vector({"w": torch.ones(1).half()}, {"w": torch.tensor([1e6])})
    with pytest.raises(ValueError, match="merged tensor 'w': 1 of 2 values do not fit"): task_arithmetic([high, high])
    assert weight_average([high, high])["w"][1] == 6e4 and not apply_task_vector(high, low)["w"][1] # what fits is a number
