import contextlib
import copy
import math
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn.utils import parametrizations, prune
from torch.utils._python_dispatch import TorchDispatchMode

import fastlora
from fastlora import backends
from fastlora import merge as merging
from fastlora.backends.reference_merge import flip_negative, round_once
from fastlora.merge import MergeError, Term

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
INT = {2: torch.int16, 4: torch.int32, 8: torch.int64}

pytestmark = pytest.mark.usefixtures("backend")


@pytest.fixture(params=["reference", "native"])
def backend_name(request):
    """The backends that merge float64, as many tests here do."""
    if reason := backends.available("cpu")[request.param]:
        pytest.skip(f"{request.param}: {reason}")
    return request.param


def bits(t):
    return t.detach().clone().contiguous().view(INT[t.element_size()])


def merge(terms, scaling):
    record = merging.MergeRecord(terms, scaling)
    record.merge(terms, scaling)
    return record


def randomize(layer, std=0.1):
    with torch.no_grad():
        for parameter in layer.lora_parameters().values():
            parameter.normal_(std=std)


def layers(dtype=torch.float32):
    yield fastlora.Linear(40, 24, r=4, dtype=dtype)
    yield fastlora.Linear(40, 24, r=4, fan_in_fan_out=True, dtype=dtype)
    on = [True, False, True]
    yield fastlora.MergedLinear(40, 24, r=2, enable_lora=on, dtype=dtype)
    yield fastlora.MergedLinear(40, 24, r=2, enable_lora=on, fan_in_fan_out=True, dtype=dtype)
    split = {"out_splits": [12, 6, 6], "interleave": 3}
    yield fastlora.MergedLinear(40, 24, r=2, enable_lora=on, **split, dtype=dtype)
    yield fastlora.Embedding(40, 24, r=4, dtype=dtype)
    for factorization in ("loralib", "locon", "tucker"):
        options = {"r": 2, "groups": 2, "factorization": factorization, "dtype": dtype}
        yield fastlora.Conv1d(4, 6, 3, **options)
        yield fastlora.Conv2d(4, 6, (3, 2), **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_thousand_cycles_give_the_weight_back_bit_for_bit(dtype):
    torch.manual_seed(0)
    layer = fastlora.Linear(48, 40, r=4, lora_alpha=8, dtype=dtype, lora_dtype=torch.float32)
    before = bits(layer.weight)
    for cycle in range(1000):
        layer.scaling = 2.0 ** (cycle % 5 - 2)
        randomize(layer)
        layer.eval()
        assert layer.merged
        randomize(layer)
        layer.scaling = 3.0
        layer.train()
    assert torch.equal(bits(layer.weight), before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_layer_merges_to_its_delta_and_back(dtype):
    torch.manual_seed(0)
    for layer in layers(dtype):
        randomize(layer)
        before = layer.weight.detach().clone()
        expected = before.double() + layer.double().delta_weight()
        layer.to(dtype)
        layer.eval()
        assert torch.equal(layer.weight, round_once(expected.detach(), dtype)), layer
        layer.train()
        assert torch.equal(bits(layer.weight), bits(before)), layer


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_merged_weight_is_the_nearest_representable(dtype):
    torch.manual_seed(0)
    weight = torch.randn(256, 512).mul(0.02).to(dtype)
    left, right = torch.randn(256, 8), torch.randn(8, 512) * 1e-3
    exact = weight.double() + 0.7 * (left.double() @ right.double())
    merge([Term(weight, left, right)], 0.7)
    error = (weight.double() - exact).abs()
    for toward in (math.inf, -math.inf):
        step = 1 if toward > 0 else -1
        order = flip_negative(bits(weight)) + step
        neighbour = flip_negative(order).view(dtype).double()
        assert (error <= (neighbour - exact).abs()).all()


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_odd_values_come_back(dtype):
    tiny = torch.finfo(dtype).tiny
    odd = [0.0, -0.0, math.inf, -math.inf, math.nan, tiny, -tiny / 4, torch.finfo(dtype).max / 2]
    weight = torch.tensor(odd * 8, dtype=dtype).view(8, 8)
    bits(weight)[3, 4] ^= 1
    before = bits(weight)
    term = Term(weight, torch.randn(8, 3), torch.randn(3, 8))
    record = merge([term], 0.5)
    record.unmerge([term])
    assert torch.equal(bits(weight), before)


@pytest.mark.parametrize(
    ("dtype", "limit"), [(torch.bfloat16, 0.75), (torch.float16, 0.75), (torch.float32, 1.0)]
)
def test_undoing_costs_less_than_a_byte_a_weight(dtype, limit):
    torch.manual_seed(0)
    layer = fastlora.Linear(1024, 1024, r=16, lora_alpha=16, dtype=dtype)
    with torch.no_grad():
        layer.weight.normal_(std=0.02)
        layer.lora_A.normal_(std=0.02)
        # an update a tenth of the weight
        layer.lora_B.normal_(std=0.002 / 0.02 / 4)
    before = bits(layer.weight)
    layer.merge()
    assert layer.merge_nbytes < limit * layer.weight.numel()
    layer.unmerge()
    assert torch.equal(bits(layer.weight), before)
    assert layer.merge_nbytes == 0


def test_incompressible_weights_are_kept_whole():
    weight = torch.randn(64, 64, dtype=torch.float64)
    before = weight.clone()
    term = Term(weight, torch.randn(64, 2, dtype=torch.float64), torch.randn(2, 64).double())
    record = merge([term], 1.0)
    assert weight.nbytes <= record.nbytes <= weight.nbytes + 64 * 2 * 24
    record.unmerge([term])
    assert torch.equal(weight, before)


def test_the_prediction_does_not_depend_on_the_order_of_summation():
    torch.manual_seed(0)
    for r in (1, 3, 16, 64, 256):
        weight = torch.zeros(32, 48)
        left, right = torch.randn(32, r) * 100, torch.randn(r, 48) * 1e-3
        predictor = merging._Predictor.of(Term(weight, left, right), 1.7)
        q_left, q_right = predictor.left.long(), predictor.right.long()
        exact = q_left @ q_right
        assert exact.abs().max() <= 2**53
        assert torch.equal(q_left.double() @ q_right.double(), exact.double())
        order = torch.randperm(r)
        assert torch.equal(q_left.double()[:, order] @ q_right.double()[order], exact.double())


def test_thread_count_may_change_while_merged():
    torch.manual_seed(0)
    layer = fastlora.Linear(700, 600, r=16, dtype=torch.bfloat16, init_lora_weights=False)
    before, threads = bits(layer.weight), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        layer.merge()
        torch.set_num_threads(2)
        layer.unmerge()
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(bits(layer.weight), before)


@pytest.mark.parametrize(
    "context",
    [
        lambda: torch.autocast("cpu", torch.bfloat16),
        torch.inference_mode,
        torch.no_grad,
        contextlib.nullcontext,
    ],
)
def test_merge_is_the_same_in_any_context(context):
    torch.manual_seed(0)
    layer = fastlora.Linear(40, 24, r=4, init_lora_weights=False)
    before = layer.weight.detach().clone()
    layer.eval()
    expected = layer.weight.detach().clone()
    layer.train()
    with context():
        layer.eval()
        assert torch.equal(layer.weight, expected)
    layer.train()
    assert torch.equal(layer.weight, before)


def test_state_dict_is_the_same_merged_or_not():
    torch.manual_seed(0)
    for layer in layers(torch.bfloat16):
        randomize(layer)
        before = {key: t.clone() for key, t in layer.state_dict().items()}
        layer.eval()
        assert layer.merged
        after = layer.state_dict()
        assert list(before) == list(after)
        assert all(torch.equal(before[key], after[key]) for key in before)


def test_loading_into_a_merged_layer_merges_what_was_loaded():
    torch.manual_seed(0)
    source, target = (fastlora.Linear(40, 24, r=4, init_lora_weights=False) for _ in range(2))
    target.eval()
    target.load_state_dict(source.state_dict())
    assert target.merged
    expected = source.weight.detach().clone()
    source.eval()
    assert torch.equal(target.weight, source.weight)
    target.train()
    assert torch.equal(target.weight, expected)


def test_uninitialised_memory_is_not_taken_for_a_merged_weight():
    source = fastlora.Linear(40, 24, r=4, init_lora_weights=False)
    for garbage in (math.nan, math.inf):
        target = fastlora.Linear(40, 24, r=4)
        target.weight.data.fill_(garbage)
        target.load_state_dict(source.state_dict())
        assert torch.equal(target.weight, source.weight)


def test_switch_is_a_merge_from_scratch():
    torch.manual_seed(0)
    for layer in layers(torch.bfloat16):
        randomize(layer)
        before = bits(layer.weight)
        new = {name: torch.randn_like(p) * 0.1 for name, p in layer.lora_parameters().items()}
        layer.merge()
        layer.switch(new, scaling=0.3)
        assert layer.scaling == 0.3
        assert all(torch.equal(p, new[name]) for name, p in layer.lora_parameters().items())
        switched = bits(layer.weight)
        layer.unmerge()
        assert torch.equal(bits(layer.weight), before)
        layer.merge()
        assert torch.equal(bits(layer.weight), switched)


@pytest.mark.parametrize("merged", [False, True])
def test_refused_switch_changes_nothing(merged):
    layer = fastlora.Linear(40, 24, r=4, init_lora_weights=False)
    if merged:
        layer.merge()
    before = {name: p.clone() for name, p in layer.named_parameters()}
    good = {name: torch.zeros_like(p) for name, p in layer.lora_parameters().items()}
    bad = [
        (KeyError, {"lora_A": good["lora_A"]}),
        (KeyError, {**good, "lora_C": good["lora_A"]}),
        (ValueError, {**good, "lora_B": good["lora_B"].t()}),
    ]
    if merged:
        bad.append((MergeError, {**good, "lora_A": good["lora_A"] + math.nan}))
    for error, factors in bad:
        with pytest.raises(error):
            layer.switch(factors, scaling=9.0)
        assert layer.scaling == 0.25
        assert layer.merged is merged
        assert all(torch.equal(p, before[name]) for name, p in layer.named_parameters())


def test_a_changed_factor_is_noticed_while_merged():
    layer = fastlora.Linear(8, 6, r=2, init_lora_weights=False).double().eval()
    x = torch.randn(3, 8, dtype=torch.float64)
    layer(x)
    with torch.no_grad():
        layer.lora_B.add_(1)
    with pytest.warns(UserWarning, match="have changed since they were merged"):
        layer(x)
    layer.merge()
    expected = layer(x)
    layer.train()
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_a_checksum_tells_values_and_places(dtype):
    factor = torch.randn(16, 24, dtype=dtype)
    expected, seen = merging.checksum(factor), set()
    assert merging.checksum(factor.t().contiguous().t()) == expected
    for i in range(16):
        changed = factor.clone()
        changed.view(INT[changed.element_size()])[i, i] ^= 1
        seen.add(merging.checksum(changed))
    swapped = factor.clone()
    swapped[0, 0], swapped[0, 1] = factor[0, 1], factor[0, 0]
    seen.add(merging.checksum(swapped))
    assert len(seen) == 17 and expected not in seen


def test_training_a_merged_layer_warns():
    layer, x = fastlora.Linear(8, 6, r=2, merge_weights=False), torch.randn(3, 8)
    layer.merge()
    with pytest.warns(UserWarning, match="is merged, so its factors get no gradient"):
        layer(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with torch.no_grad():
            layer(x)
        layer.eval()
        layer(x)
        layer.unmerge()
        layer.train()
        layer(x)


def test_an_edited_weight_is_refused():
    layer = fastlora.Linear(8, 6, r=2, init_lora_weights=False).eval()
    layer.weight.data[0, 0] += 1
    edited = layer.weight.clone()
    with pytest.raises(MergeError, match="edited while merged"):
        layer.train()
    assert torch.equal(layer.weight, edited)


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_broken_adapter_leaves_the_weight(poison):
    layer = fastlora.Linear(8, 6, r=2, init_lora_weights=False)
    with torch.no_grad():
        layer.lora_A[1, 3] = poison
    before = layer.weight.clone()
    with pytest.raises(MergeError, match="NaN or Inf"):
        layer.merge()
    assert torch.equal(layer.weight, before)
    assert not layer.merged


def test_eval_with_a_broken_adapter_warns_and_goes_on_unmerged():
    layer = fastlora.Linear(8, 6, r=2, init_lora_weights=False)
    with torch.no_grad():
        layer.lora_A[1, 3] = math.nan
    before = layer.weight.clone()
    with pytest.warns(UserWarning, match="was not merged: lora factors: got NaN"):
        layer.eval()
    assert not layer.training and not layer.merged
    assert torch.equal(layer.weight, before)
    assert layer(torch.ones(8)).isnan().any()


def test_overflow_is_refused_before_anything_is_written():
    layer = fastlora.Linear(8, 600, r=2, dtype=torch.float16, lora_dtype=torch.float32)
    with torch.no_grad():
        layer.lora_A.fill_(300)
        layer.lora_B[-1] = 300
    before = layer.weight.clone()
    with pytest.raises(MergeError, match="overflow"):
        layer.merge()
    assert torch.equal(layer.weight, before)
    with torch.no_grad():
        # the bound of each factor is as large, the sum is not
        layer.lora_A[1] *= -1
    layer.merge()
    layer.unmerge()
    assert torch.equal(layer.weight, before)


def test_overflow_hidden_by_the_merged_delta_is_refused():
    layer = fastlora.Linear(8, 6, r=1, dtype=torch.float16)
    with torch.no_grad():
        layer.weight.fill_(60000)
        layer.lora_A.fill_(100)
        layer.lora_B.fill_(-300)
    before = layer.weight.clone()
    layer.merge()
    merged = layer.weight.clone()
    new = {"lora_A": layer.lora_A.detach(), "lora_B": layer.lora_B.detach() / -3}
    with pytest.raises(MergeError, match="overflow"):
        layer.switch(new)
    assert torch.equal(layer.weight, merged)
    layer.unmerge()
    assert torch.equal(layer.weight, before)


def model():
    torch.manual_seed(0)
    return nn.Sequential(
        fastlora.Linear(8, 6, r=2, init_lora_weights=False),
        nn.ReLU(),
        fastlora.MergedLinear(6, 9, r=1, enable_lora=[True, False, True], init_lora_weights=False),
    )


def test_merged_restores_exactly_even_after_an_exception():
    net, x = model().double(), torch.randn(5, 8).double()
    before = {name: p.clone() for name, p in net.named_parameters()}
    expected = net(x)
    with pytest.raises(ZeroDivisionError), fastlora.merged(net):
        assert net[0].merged and net[2].merged and net.training
        with torch.no_grad():
            torch.testing.assert_close(net(x), expected)
        raise ZeroDivisionError
    assert not net[0].merged and not net[2].merged
    assert all(torch.equal(p, before[name]) for name, p in net.named_parameters())


def test_merged_leaves_what_was_merged():
    net = model()
    net[0].merge()
    with fastlora.merged(net), fastlora.merged(net):
        assert net[2].merged
    assert net[0].merged and not net[2].merged


def test_merged_with_a_broken_layer_merges_none():
    net = model()
    before = net[0].weight.clone()
    with torch.no_grad():
        net[2].lora_A.fill_(math.nan)
    with pytest.raises(MergeError), fastlora.merged(net):
        raise AssertionError("not reached")
    assert torch.equal(net[0].weight, before)


def test_switching_a_model_is_all_or_nothing():
    net = model().eval()
    adapter = {key: torch.randn_like(t) for key, t in fastlora.lora_state_dict(net).items()}
    before = {name: p.clone() for name, p in net.named_parameters()}
    broken = {**adapter, "2.lora_B": adapter["2.lora_B"] * math.nan}
    for error, wrong in [
        (MergeError, broken),
        (KeyError, {"0.lora_A": adapter["0.lora_A"]}),
        (KeyError, {**adapter, "9.lora_A": adapter["0.lora_A"]}),
        (ValueError, {**adapter, "0.lora_A": adapter["0.lora_B"]}),
    ]:
        with pytest.raises(error):
            fastlora.switch(net, wrong)
        assert all(torch.equal(p, before[name]) for name, p in net.named_parameters())
    fastlora.switch(net, adapter, scaling=0.5)
    net.double()
    x = torch.randn(5, 8).double()
    merged = net(x)
    net.train()
    torch.testing.assert_close(net(x), merged)
    assert net[0].scaling == net[2].scaling == 0.5


# ---- what is interrupted


class Interrupts(TorchDispatchMode):
    """Raises KeyboardInterrupt, as Ctrl-C does, at the n-th operation, or after it has run."""

    def __init__(self, n, after):
        super().__init__()
        self.left, self.after = n, after

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.left -= 1
        if self.left == 0 and not self.after:
            raise KeyboardInterrupt
        result = function(*args, **(kwargs or {}))
        if self.left == 0:
            raise KeyboardInterrupt
        return result


def interrupted(action):
    """Runs ``action`` again and again, each time interrupted one operation later."""
    for after in (False, True):
        for n in range(1, 10_000):
            try:
                with Interrupts(n, after) as mode:
                    action()
            except KeyboardInterrupt:
                yield
            if mode.left > 0:
                break
        else:
            pytest.fail("never ran through")


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(merging, "_BLOCK_ELEMENTS", 16)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_interrupted_merge_leaves_the_weight(dtype):
    layer = fastlora.Linear(8, 4, r=2, init_lora_weights=False, dtype=dtype)
    before = bits(layer.weight)
    runs = 0
    for _ in interrupted(layer.eval):
        runs += 1
        if not layer.merged:
            assert torch.equal(bits(layer.weight), before)
        layer.train()
        assert torch.equal(bits(layer.weight), before) and not layer.merged
    assert runs > 20
    assert layer.merged


@pytest.mark.usefixtures("small_blocks")
def test_an_interrupted_unmerge_goes_on_where_it_was():
    layer = fastlora.Linear(8, 4, r=2, init_lora_weights=False)
    before = bits(layer.weight)
    layer.merge()
    merged = bits(layer.weight)
    for _ in interrupted(layer.unmerge):
        # merged again, it is so as a whole
        layer.merge()
        assert torch.equal(bits(layer.weight), merged)
        layer.unmerge()
        assert torch.equal(bits(layer.weight), before) and not layer.merged
        layer.merge()


@pytest.mark.usefixtures("small_blocks")
def test_an_interrupted_switch_ends_with_one_adapter_or_none():
    layer = fastlora.Linear(8, 4, r=2, init_lora_weights=False)
    before = bits(layer.weight)
    old = {name: p.detach().clone() for name, p in layer.lora_parameters().items()}
    new = {name: torch.randn_like(p) for name, p in old.items()}
    layer.merge()
    merged = layer.weight.detach().clone()
    for _ in interrupted(lambda: layer.switch(new)):
        layer.unmerge()
        assert torch.equal(bits(layer.weight), before)
        layer.switch(old)
        layer.merge()
        assert torch.equal(layer.weight, merged)
    layer.unmerge()
    assert torch.equal(bits(layer.weight), before)


@pytest.mark.usefixtures("small_blocks")
def test_a_merge_without_memory_is_refused_whole(monkeypatch):
    layer = fastlora.Linear(8, 50, r=2, init_lora_weights=False)
    before = bits(layer.weight)
    add_to, calls = merging._Delta.add_to, iter(range(100))

    def out_of_memory(*args):
        if next(calls) == 9:
            raise torch.OutOfMemoryError("no memory left")
        return add_to(*args)

    monkeypatch.setattr(merging._Delta, "add_to", out_of_memory)
    with pytest.raises(torch.OutOfMemoryError):
        layer.merge()
    assert torch.equal(bits(layer.weight), before) and not layer.merged


# ---- what was edited


def test_rows_in_another_order_are_an_edit():
    layer = fastlora.Linear(8, 6, r=2, init_lora_weights=False).eval()
    layer.weight.data.copy_(layer.weight.data[[5, 0, 1, 2, 3, 4]])
    with pytest.raises(MergeError, match="edited while merged"):
        layer.train()


def test_an_edited_weight_is_replaced_by_a_state_dict_or_drawn_anew():
    layer = fastlora.Linear(8, 6, r=2, init_lora_weights=False)
    state = {name: t.clone() for name, t in layer.state_dict().items()}
    merged = layer.eval().weight.detach().clone()
    layer.weight.data.mul_(2)
    for action in (layer.state_dict, layer.train, lambda: layer.to("cpu")):
        with pytest.raises(MergeError, match="edited while merged"):
            action()
    layer.load_state_dict(state)
    assert torch.equal(layer.weight, merged)
    layer.train()
    assert torch.equal(layer.weight, state["weight"])
    layer.eval().weight.data.mul_(2)
    layer.reset_parameters()
    assert not layer.merged
    layer.train()


def test_eval_does_not_pass_over_an_edited_weight():
    layer = fastlora.Linear(8, 6, r=2, init_lora_weights=False).eval()
    layer.weight.data.mul_(2)
    layer.lora_A.data.mul_(2)
    with pytest.raises(MergeError, match="edited while merged"):
        layer.eval()


# ---- what is never merged


def test_weights_of_two_models_are_merged_once():
    base = nn.Linear(8, 6)
    one, other = (fastlora.Linear.from_linear(base, 2, init_lora_weights=False) for _ in range(2))
    x = torch.randn(3, 8)
    expected = other(x)
    one.eval()
    with pytest.warns(UserWarning, match="holds the update of another layer"):
        other.eval()
    with pytest.raises(ValueError, match="holds the update of another layer"):
        other.merge()
    one.train()
    torch.testing.assert_close(other(x), expected)
    other.eval()
    assert other.merged
    torch.testing.assert_close(other(x), expected)


@pytest.mark.parametrize("of", ["weight", "lora_A"])
def test_pruned_layers_are_not_merged(of):
    layer = fastlora.Linear(8, 6, r=2, init_lora_weights=False)
    prune.l1_unstructured(layer, of, 0.5)
    x = torch.randn(3, 8)
    expected = layer(x)
    with pytest.warns(UserWarning, match=f"its {of} is computed"):
        layer.eval()
    assert not layer.merged and torch.equal(layer(x), expected)
    with pytest.raises(ValueError, match=f"its {of} is computed"):
        layer.merge()
    layer.train()


def test_parametrized_layers_are_not_merged():
    layer = fastlora.Linear(8, 6, r=2, init_lora_weights=False)
    parametrizations.weight_norm(layer, "weight")
    x = torch.randn(3, 8)
    expected = layer(x)
    with pytest.warns(UserWarning, match="its weight is computed"):
        layer.eval()
    assert torch.equal(layer(x), expected)


def test_without_data_there_is_nothing_to_merge():
    with torch.device("meta"):
        layer = fastlora.Linear(8, 6, r=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer.eval()
        assert not layer.merged
        layer.to_empty(device="cpu").reset_parameters()
        assert layer.train().eval().merged
        assert not layer.to("meta").merged
    for refused in (layer.merge, layer.delta_weight, layer.merged_parameters):
        with pytest.raises(ValueError, match="meta tensor"):
            refused()
    with torch._subclasses.FakeTensorMode():
        layer = fastlora.Linear(8, 6, r=2)
        with pytest.warns(UserWarning, match="its weight is a FakeTensor"):
            layer.eval()


def test_a_conversion_that_cannot_be_merged_anew_goes_on_unmerged():
    layer = fastlora.Linear(8, 6, r=2, init_lora_weights=False)
    with torch.no_grad():
        layer.lora_A.fill_(1e3)
        layer.lora_B.fill_(1e3)
    layer.eval()
    with pytest.warns(UserWarning, match="overflow"):
        layer.half()
    assert not layer.merged and layer.weight.dtype == torch.float16


# ---- merged weights for elsewhere


@pytest.mark.parametrize("mode", [True, False])
def test_merged_state_dict_is_that_of_a_plain_model(mode):
    model = nn.Sequential(*(layer for layer in layers(torch.float32)))
    for layer in model:
        randomize(layer)
    model.train(mode)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    state = fastlora.merged_state_dict(model)
    assert not any("lora_" in name for name in state)
    for name, t in model.state_dict().items():
        assert torch.equal(t, before[name])
    model.eval()
    for i, layer in enumerate(model):
        assert torch.equal(state[f"{i}.weight"], layer.weight)
        assert state[f"{i}.weight"].data_ptr() != layer.weight.data_ptr()
    # as the docstring of merged() says
    assert torch.equal(model.state_dict()["0.weight"], before["0.weight"])


def test_merged_state_dict_has_the_bias_of_the_factors():
    for make in (
        lambda: fastlora.Linear(8, 6, r=2, lora_bias=True, bias=False),
        lambda: fastlora.MergedLinear(8, 6, r=2, enable_lora=[True, False], lora_bias=True),
        lambda: fastlora.Conv2d(8, 6, 3, r=2, lora_bias=True, factorization="locon"),
    ):
        layer = make()
        randomize(layer)
        state = fastlora.merged_state_dict(layer)
        x = torch.randn(2, 8, 5, 5) if isinstance(layer, nn.Conv2d) else torch.randn(2, 8)
        plain = nn.Conv2d(8, 6, 3) if isinstance(layer, nn.Conv2d) else nn.Linear(8, 6)
        plain.load_state_dict(state)
        torch.testing.assert_close(plain(x), layer(x))
        torch.testing.assert_close(plain(x), layer.eval()(x))


@pytest.mark.filterwarnings("error::UserWarning")
def test_merged_state_dict_names_weights_that_are_shared():
    net = nn.ModuleDict({"emb": nn.Embedding(10, 8), "head": nn.Linear(8, 10, bias=False)})
    net["head"].weight = net["emb"].weight
    with pytest.warns(UserWarning, match="its weight is also"):
        fastlora.inject(net, ["emb"], r=2, init_lora_weights=False)
    with pytest.warns(UserWarning, match=r"emb: its weight, which is also head\.weight, holds"):
        state = fastlora.merged_state_dict(net)
    assert not torch.equal(state["emb.weight"], state["head.weight"])


# ---- what is replaced while it is merged


def evaluated():
    """A merged layer, an input, what comes out, and W0."""
    torch.manual_seed(0)
    layer, x = (
        fastlora.Linear(8, 6, r=2, init_lora_weights=False).double(),
        torch.randn(3, 8).double(),
    )
    expected, base = layer(x).detach(), layer.weight.detach().clone()
    return layer.eval(), x, expected, base


def assign(layer, weight):
    layer.weight = nn.Parameter(weight, requires_grad=False)


def assign_data(layer, weight):
    layer.weight.data = weight


told = r"its weight is not the one that was merged, and is taken for the base"


@pytest.mark.parametrize("put", [assign, assign_data])
def test_a_weight_that_was_replaced_is_the_base(put):
    layer, x, expected, base = evaluated()
    put(layer, layer.state_dict()["weight"])
    with pytest.warns(UserWarning, match=told):
        torch.testing.assert_close(layer(x), expected)
    assert "path: the plain layer" not in fastlora.explain(layer, x)
    with warnings.catch_warnings():
        # once a layer
        warnings.simplefilter("error")
        torch.testing.assert_close(layer(x), expected)
        assert torch.equal(layer.state_dict()["weight"], base)
        merged = fastlora.merged_state_dict(layer)["weight"]
        # a copy does not forget
        for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            torch.testing.assert_close(other(x), expected)
        layer.eval()
        assert torch.equal(layer.weight, merged)
        torch.testing.assert_close(layer(x), expected)
        layer.train()
        assert torch.equal(layer.weight, base) and not layer.merged
        torch.testing.assert_close(layer(x), expected)


def test_a_weight_that_is_replaced_for_a_call():
    layer, x, expected, base = evaluated()
    with pytest.warns(UserWarning, match=told):
        torch.testing.assert_close(functional_call(layer, layer.state_dict(), (x,)), expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for state in (
            layer.state_dict(),
            dict(layer.named_parameters()),
            {name: p.clone() for name, p in layer.named_parameters()},
        ):
            torch.testing.assert_close(functional_call(layer, state, (x,)), expected)
            torch.testing.assert_close(layer(x), expected)
    layer.train()
    assert torch.equal(layer.weight, base)


@pytest.mark.filterwarnings("error::UserWarning")
def test_a_merged_weight_that_was_moved_is_merged():
    layer, x, expected, base = evaluated()
    layer.weight.data = layer.weight.data.clone()
    torch.testing.assert_close(layer(x), expected)
    layer.share_memory()
    torch.testing.assert_close(layer(x), expected)
    layer.load_state_dict(layer.state_dict(), assign=True)
    for other in (copy.copy(layer), copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert other.merged and other._merged_memory
        torch.testing.assert_close(other(x), expected)
    layer.train()
    assert torch.equal(layer.weight, base)


def test_a_foreign_weight_is_never_written():
    layer, x, _, _ = evaluated()
    foreign = torch.randn(6, 8).double()
    expected = x @ (foreign + layer.delta_weight()).T + layer.bias
    layer.weight.data = foreign.clone()
    with pytest.warns(UserWarning, match=told):
        torch.testing.assert_close(layer(x), expected)
    for action in (layer.train, layer.eval, layer.merge, layer.state_dict, layer.float):
        with pytest.raises(MergeError, match="edited while merged, or replaced"):
            action()
        assert torch.equal(layer.weight, foreign)
    state = {**dict(layer.named_parameters()), "weight": foreign}
    layer.load_state_dict(state)
    torch.testing.assert_close(layer(x), expected)
    layer.train()
    assert torch.equal(layer.weight, foreign)


@pytest.mark.filterwarnings("ignore:Linear. its weight is not the one")
def test_offloaded_weights():
    """As accelerate does it: parameters are on the meta device but for their module's forward."""
    layer, x, expected, base = evaluated()
    offloaded = {name: t.clone() for name, t in layer.state_dict().items()}

    def put(state):
        for name, t in state.items():
            setattr(layer, name, nn.Parameter(t, requires_grad=False))

    empty = {name: t.to("meta") for name, t in offloaded.items()}
    for _ in range(5):
        put(empty)
        assert layer.state_dict()["weight"].is_meta
        # memory of just that size is free now, and may be taken again
        put({name: t.clone() for name, t in offloaded.items()})
        torch.testing.assert_close(layer(x), expected)
    put(empty)
    with pytest.raises(MergeError, match="was merged before its weight is a meta tensor"):
        layer.train()
    put(offloaded)
    layer.train()
    assert torch.equal(layer.weight, base)


@pytest.mark.filterwarnings("error::UserWarning")
def test_what_has_no_memory_is_taken_as_before():
    layer, x, expected, _ = evaluated()
    parameters = dict(layer.named_parameters())

    def loss(weight):
        return functional_call(layer, {**parameters, "weight": weight}, (x,)).sum()

    grad = torch.func.grad(loss)(parameters["weight"])
    torch.testing.assert_close(grad, x.sum(0).expand(6, 8))
    two = torch.stack([parameters["weight"]] * 2).detach()
    rows = torch.vmap(lambda w: functional_call(layer, {**parameters, "weight": w}, (x,)))(two)
    torch.testing.assert_close(rows[1], expected)
    stacked, _ = torch.func.stack_module_state([layer, layer])
    rows = torch.vmap(lambda state: functional_call(layer, state, (x,)))(stacked)
    torch.testing.assert_close(rows[1], expected)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = {name: mode.from_tensor(p) for name, p in parameters.items()}
        assert functional_call(layer, fake, (mode.from_tensor(x),)).shape == (3, 6)


@pytest.mark.parametrize("name", ["lora_A", "lora_B"])
def test_factors_replaced_through_data_are_noticed(name):
    layer, x, _, _ = evaluated()
    for _ in range(10):
        layer(x)
        # the second takes the memory that the first left
        for _ in range(2):
            getattr(layer, name).data = torch.randn_like(getattr(layer, name).detach())
        with pytest.warns(UserWarning, match="have changed since they were merged"):
            layer(x)
    layer.merge()
    merged = layer(x)
    torch.testing.assert_close(layer.train()(x), merged)


def test_weights_of_fsdp2_are_not_merged():
    """Those of its root group are whole between forward and the next one, but not the module's."""
    layer = fastlora.Linear(8, 6, r=2, init_lora_weights=False)
    before = layer.weight.clone()
    layer._is_fsdp_managed_module = True
    with pytest.warns(UserWarning, match="was not merged: .*FSDP's"):
        layer.eval()
    assert torch.equal(layer.weight, before) and not layer.merged
    with pytest.raises(ValueError, match="FSDP's"):
        layer.merge()


@pytest.mark.parametrize("what", ["weight", "lora_A"])
@pytest.mark.parametrize(
    "how", [parametrizations.weight_norm, lambda layer, name: prune.identity(layer, name)]
)
def test_a_merge_that_came_before_a_parametrization_is_not_undone(what, how):
    layer, x, expected, _ = evaluated()
    how(layer, what)
    with warnings.catch_warnings():
        # a pruned factor may be another
        warnings.simplefilter("ignore")
        torch.testing.assert_close(layer(x), expected)
    before = {name: p.clone() for name, p in layer.named_parameters()}
    for action in (layer.unmerge, layer.train, layer.state_dict):
        with pytest.raises(MergeError, match=f"was merged before its {what} is computed"):
            action()
    assert layer.merged
    assert all(torch.equal(p, before[name]) for name, p in layer.named_parameters())


def test_factors_that_do_not_fit_are_not_merged():
    for layer in layers():
        for name, p in layer.lora_parameters().items():
            for shape in (
                (p.shape[0] + 1, *p.shape[1:]),
                (p.shape[0], p.shape[1] + 1, *p.shape[2:]),
            ):
                other = copy.deepcopy(layer)
                setattr(other, name, nn.Parameter(torch.ones(shape)))
                before = other.weight.clone()
                with pytest.raises((ValueError, RuntimeError)):
                    other.merge()
                assert torch.equal(other.weight, before) and not other.merged
