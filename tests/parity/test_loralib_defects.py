"""loralib's known defects, numbered: that loralib has them, and that fastlora does not."""

import math
import pickle
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import fastlora

loralib = pytest.importorskip("loralib")

QV = [True, False, True]
LAYERS = {
    "Linear": (lambda lora, **k: lora.Linear(6, 10, r=2, **k), (3, 6)),
    "MergedLinear": (lambda lora, **k: lora.MergedLinear(6, 12, r=2, enable_lora=QV, **k), (3, 6)),
    "Embedding": (lambda lora, **k: lora.Embedding(9, 5, r=2, **k), None),
    "Conv2d": (lambda lora, **k: lora.Conv2d(4, 6, 3, r=2, **k), (2, 4, 5, 5)),
}
ADDMM_ = torch.ops.aten.addmm_
layers = pytest.mark.parametrize("kind", LAYERS)


def draw_factors(model, std=0.3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if name.rpartition(".")[2].startswith("lora_"):
            p.data = (torch.randn(p.shape, generator=generator) * std).to(p.dtype)
    return model


def input_of(kind):
    shape = LAYERS[kind][1]
    return torch.tensor([[0, 3, 8], [3, 3, 1]]) if shape is None else torch.randn(shape)


def base_weight(layer):
    return layer.conv.weight if hasattr(layer, "conv") else layer.weight


class Log(TorchDispatchMode):
    """The operations that run, and the bytes of each new storage among their results."""

    def __init__(self):
        super().__init__()
        self.ops, self.bool_indices, self.new_bytes = [], 0, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        self.ops.append(func.overloadpacket.__name__)
        if "index" in self.ops[-1]:
            self.bool_indices += sum(t.dtype == torch.bool for t in inputs)
        result = func(*args, **(kwargs or {}))
        old = {t.untyped_storage().data_ptr() for t in inputs}
        for t in tree_leaves(result):
            if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() not in old:
                self.new_bytes.append(t.untyped_storage().nbytes())
        return result


def addmm_flops(out, a, b, *args, **kwargs):
    return 2 * a[0] * a[1] * b[1]


def saved_storages(function):
    """Bytes of each storage that is kept for backward, by address."""
    storages = {}

    def pack(t):
        storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        function()
    return storages


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_defect_01_unmerge_is_exact(dtype):
    """Adding and subtracting the delta loses bits of the weight at every eval/train cycle."""
    after = {}
    for lora in (loralib, fastlora):
        torch.manual_seed(0)
        layer = draw_factors(lora.Linear(64, 64, r=4, dtype=dtype))
        before = layer.weight.detach().clone()
        for cycle in range(5):
            layer.eval()
            assert not torch.equal(layer.weight, before)
            layer.train()
            draw_factors(layer, seed=cycle)
        after[lora] = torch.equal(layer.weight, before)
    assert after == {loralib: False, fastlora: True}


@layers
def test_defect_02_factors_may_change_while_merged(kind):
    """train() subtracts the delta of the moment, not the one that eval() has added."""
    lost = {}
    for lora in (loralib, fastlora):
        layer = draw_factors(LAYERS[kind][0](lora))
        before = base_weight(layer).detach().clone()
        layer.eval()
        layer.lora_B.data.mul_(2)
        layer.scaling *= 3
        adapter = {name: f + 1 for name, f in lora.lora_state_dict(layer).items()}
        layer.load_state_dict(adapter, strict=False)
        layer.train()
        lost[lora] = (base_weight(layer) - before).abs().max().item()
    assert lost[loralib] > 0.1
    assert lost[fastlora] == 0


def test_defect_02_a_stale_merge_is_seen():
    """The output of a merged layer goes on showing the old factors, in silence."""
    layer = draw_factors(fastlora.Linear(6, 10, r=2)).eval()
    x = torch.randn(3, 6)
    with torch.no_grad():
        layer.lora_B.mul_(2)
    with pytest.warns(UserWarning, match="factors have changed"):
        layer(x)
    now = layer.eval()(x)
    torch.testing.assert_close(now, layer.train()(x))


@layers
def test_defect_03_state_dict_holds_the_base_weight(kind):
    """A checkpoint saved in eval mode holds merged weights, and loading it adds the delta twice."""
    make = LAYERS[kind][0]
    equal = {}
    for lora in (loralib, fastlora):
        layer = draw_factors(make(lora))
        train = {k: t.clone() for k, t in layer.state_dict().items()}
        layer.eval()
        eval_ = layer.state_dict()
        assert train.keys() == eval_.keys()
        equal[lora] = all(torch.equal(train[k], eval_[k]) for k in train)
    assert equal == {loralib: False, fastlora: True}


@layers
def test_defect_03_a_merged_checkpoint_is_refused_or_undone(kind):
    """Nothing in a merged checkpoint of loralib says that it is one."""
    make = LAYERS[kind][0]
    torch.manual_seed(0)
    source = draw_factors(make(loralib))
    x = input_of(kind)
    expected = source(x)
    source.eval()
    merged = {k: t.clone() for k, t in source.state_dict().items()}

    torch.manual_seed(0)
    model = make(fastlora)
    before = {k: t.clone() for k, t in model.state_dict().items()}
    with pytest.raises(RuntimeError, match=r"assume_merged=True"):
        model.load_state_dict(merged)
    with pytest.raises(ValueError, match=r"assume_merged=True"):
        fastlora.adapters.load(model, merged)
    assert all(torch.equal(before[k], t) for k, t in model.state_dict().items())
    fastlora.adapters.load(model, merged, assume_merged=True)
    # loralib's merge has rounded the weight once or twice
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)

    source.train()
    source.load_state_dict(merged)
    assert not torch.allclose(source(x), expected, rtol=1e-2, atol=1e-2)


def test_defect_03_an_adapter_loads_in_eval_mode():
    """An adapter loaded in eval mode has no effect, then corrupts the weight at train()."""
    adapter = fastlora.lora_state_dict(draw_factors(fastlora.Linear(6, 10, r=2)))
    x = torch.randn(3, 6)
    for lora in (loralib, fastlora):
        layer = lora.Linear(6, 10, r=2)
        before = layer.weight.detach().clone()
        layer.eval()
        plain = layer(x)
        layer.load_state_dict(adapter, strict=False)
        assert torch.equal(layer(x), plain) == (lora is loralib)
        layer.train()
        assert torch.equal(layer.weight, before) == (lora is fastlora)


def test_defect_04_autocast_does_not_reach_a_merge():
    """eval() under autocast merges a delta of 16 bits, which train() outside of it cannot undo."""
    for lora in (loralib, fastlora):
        layer = draw_factors(lora.Linear(32, 32, r=4))
        before = layer.weight.detach().clone()
        exact = before.double() + layer.scaling * layer.lora_B.double() @ layer.lora_A.double()
        with torch.autocast("cpu", torch.bfloat16):
            layer.eval()
        error = (layer.weight - exact).abs().max().item()
        layer.train()
        if lora is loralib:
            assert error > 1e-4
            assert (layer.weight - before).abs().max() > 1e-4
        else:
            assert error < torch.finfo(torch.float32).eps * exact.abs().max()
            assert torch.equal(layer.weight, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_defect_05_merge_rounds_once(dtype):
    """The product, its scaling and the sum are each rounded to 16 bits."""
    wrong = {}
    for lora in (loralib, fastlora):
        torch.manual_seed(0)
        layer = draw_factors(lora.Linear(96, 96, r=4, lora_alpha=8, dtype=dtype), std=0.1)
        exact = layer.weight.double() + 2 * layer.lora_B.double() @ layer.lora_A.double()
        layer.eval()
        error = (layer.weight - exact).abs()
        inf = torch.full_like(layer.weight, math.inf)
        neighbours = [torch.nextafter(layer.weight, end) for end in (inf, -inf)]
        nearer = [(n - exact).abs() < error for n in neighbours]
        wrong[lora] = (nearer[0] | nearer[1]).double().mean().item()
    assert wrong[loralib] > 0.05
    assert wrong[fastlora] == 0


def test_defect_05_merge_needs_no_memory_of_the_weights_size():
    """A merge builds the whole delta, several times over, with an autograd graph."""
    most = {}
    for lora in (loralib, fastlora):
        layer = draw_factors(lora.Linear(1024, 2048, r=4, dtype=torch.bfloat16))
        with Log() as log:
            layer.eval()
            layer.train()
        most[lora] = max(log.new_bytes)
    assert most[loralib] >= layer.weight.nbytes
    # blocks of rows are widened to fp64; the whole weight would be 16 MiB so
    assert most[fastlora] < layer.weight.nbytes


@layers
def test_defect_06_train_and_eval_return_the_layer(kind):
    """train() and eval() return None, so that layer.eval()(x) fails."""
    make = LAYERS[kind][0]
    old, new = make(loralib), make(fastlora)
    assert old.train() is None and old.eval() is None
    assert new.train() is new and new.eval() is new and new.train(False) is new


@layers
@pytest.mark.parametrize("how", ["eval", "train(False)", "in a model"])
def test_defect_07_eval_merges_however_it_is_called(kind, how):
    """Older releases overrode eval(), which a parent never calls, and forgot a transpose."""
    layer = draw_factors(LAYERS[kind][0](fastlora))
    model = nn.Sequential(layer)
    before = layer.weight.detach().clone()
    x = input_of(kind)
    expected = layer(x)
    if how == "in a model":
        model.eval()
    else:
        layer.eval() if how == "eval" else layer.train(False)
    assert layer.merged
    torch.testing.assert_close(layer.weight, before + layer.delta_weight())
    torch.testing.assert_close(layer(x), expected)
    model.train()
    assert not layer.merged
    assert torch.equal(layer.weight, before)


def test_defect_08_merged_linear_needs_two_full_products():
    """MergedLinear multiplies by its delta as by a second weight: five full products a step."""
    M, K, N, r = 64, 128, 384, 4
    full = 2 * M * N * K
    x = torch.randn(M, K, requires_grad=True)
    counted = {}
    for lora in (loralib, fastlora):
        layer = draw_factors(lora.MergedLinear(K, N, r=r, enable_lora=QV))
        # torch does not count the in-place form by itself
        counter = FlopCounterMode(display=False, custom_mapping={ADDMM_: addmm_flops})
        with counter, fastlora.use_backend("reference"):
            layer(x).sum().backward()
        counted[lora] = counter.get_total_flops() / full
    # three thin products by A (K wide, 2r rows) and three by B (two blocks, r columns)
    thin = 2 * M * (3 * K * 2 * r + 3 * (2 * N // 3) * r) / full
    assert counted[loralib] > 5
    assert 2 < counted[fastlora] <= 2 + thin


def test_defect_08_nothing_of_the_weights_size_is_saved():
    """The delta of a MergedLinear, as large as the weight, is kept for backward."""
    x = torch.randn(8, 128, requires_grad=True)
    kept = {}
    for lora in (loralib, fastlora):
        layer = draw_factors(lora.MergedLinear(128, 384, r=4, enable_lora=QV))
        storages = saved_storages(lambda layer=layer: layer(x))
        own = {p.untyped_storage().data_ptr() for p in layer.parameters()}
        own.add(x.untyped_storage().data_ptr())
        kept[lora] = sum(n for at, n in storages.items() if at not in own)
    assert kept[loralib] >= layer.weight.nbytes
    # S alone: 8 tokens, 2 blocks, rank 4, fp32
    assert kept[fastlora] == 8 * 2 * 4 * 4


def test_defect_09_no_operation_depends_on_data():
    """A boolean mask index finds its places at run time: a host synchronisation on a GPU."""
    x = torch.randn(3, 6)
    for lora in (loralib, fastlora):
        layer = lora.MergedLinear(6, 12, r=2, lora_dropout=0.5, enable_lora=QV)
        with Log() as log:
            layer(x).sum().backward()
        if lora is loralib:
            assert log.bool_indices
        else:
            assert not log.bool_indices
            assert not {"nonzero", "masked_select", "_local_scalar_dense"} & set(log.ops)


def test_defect_09_runs_on_shapes_alone():
    """The same, by what refuses every operation that would look at a value."""
    with FakeTensorMode():
        layer = fastlora.MergedLinear(6, 12, r=2, lora_dropout=0.5, enable_lora=QV)
        layer(torch.randn(3, 6)).sum().backward()
        assert layer.lora_A.grad.shape == (4, 6)


def test_defect_10_built_on_the_meta_device():
    """The mask of enabled outputs is no buffer: it stays where it was built."""
    x = torch.randn(3, 6)
    for lora in (loralib, fastlora):
        torch.manual_seed(0)
        expected = draw_factors(lora.MergedLinear(6, 12, r=2, enable_lora=QV))
        layer = lora.MergedLinear(6, 12, r=2, enable_lora=QV, device="meta").to_empty(device="cpu")
        layer.load_state_dict(expected.state_dict())
        # a wrong result, in silence
        assert torch.equal(layer(x), expected(x)) == (lora is fastlora)


def test_defect_11_no_block_enabled_is_the_plain_layer():
    """With no enabled block, forward fails in training and works in evaluation."""
    x = torch.randn(3, 6)
    with pytest.raises(AttributeError):
        loralib.MergedLinear(6, 12, r=2, enable_lora=[False, False])(x)
    layer = fastlora.MergedLinear(6, 12, r=2, enable_lora=[False, False])
    expected = F.linear(x, layer.weight, layer.bias)
    assert torch.equal(layer(x), expected)
    assert torch.equal(layer.eval()(x), expected)
    assert layer.weight.requires_grad


@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("fan", [True, False])
@pytest.mark.parametrize("blocks", [None, QV])
def test_defect_12_both_weight_layouts_in_both_modes(blocks, fan, mode):
    """fan_in_fan_out=False was broken for some releases, in one mode or the other."""
    options = {} if blocks is None else {"enable_lora": blocks}
    cls = fastlora.Linear if blocks is None else fastlora.MergedLinear
    layer = draw_factors(cls(6, 12, r=2, lora_alpha=4, fan_in_fan_out=fan, **options)).double()
    x = torch.randn(3, 6, dtype=torch.double)
    assert layer.weight.shape == ((6, 12) if fan else (12, 6))
    W = layer.weight.T if fan else layer.weight
    expected = F.linear(x, W, layer.bias)
    A, B = layer.lora_A, layer.lora_B
    for g, block in enumerate([slice(0, 12)] if blocks is None else [slice(0, 4), slice(8, 12)]):
        rows = slice(g * (block.stop - block.start), (g + 1) * (block.stop - block.start))
        expected[:, block] += 2 * x @ A[2 * g : 2 * g + 2].T @ B[rows].T
    layer.train(mode)
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
def test_defect_13_blocks_of_any_size_and_layout(mode):
    """Blocks have to be equal and contiguous: no grouped-query attention, no layout by head."""
    with pytest.raises(AssertionError):
        loralib.MergedLinear(6, 16, r=2, enable_lora=[True, True, True])
    x = torch.randn(3, 6, dtype=torch.double)

    def check(splits, enabled, interleave):
        n = sum(splits)
        layout = {"enable_lora": enabled, "out_splits": splits, "interleave": interleave}
        layer = draw_factors(fastlora.MergedLinear(6, n, r=2, dtype=torch.double, **layout))
        # the output features in block order
        order = torch.arange(n).view(interleave, -1)
        ends = [sum(splits[:i]) // interleave for i in range(len(splits) + 1)]
        blocks = [order[:, a:b].flatten() for a, b in pairwise(ends)]
        expected = F.linear(x, layer.weight, layer.bias)
        A, B = layer.lora_A, layer.lora_B
        for block in (b for b, on in zip(blocks, enabled, strict=True) if on):
            expected[:, block] += layer.scaling * x @ A[:2].T @ B[: len(block)].T
            A, B = A[2:], B[len(block) :]
        assert not len(A) and not len(B)
        torch.testing.assert_close(layer.train(mode)(x), expected, rtol=1e-12, atol=1e-12)

    check([8, 4, 4], [True, True, True], 1)
    check([8, 4, 4], [True, False, True], 4)
    check([4, 4, 4], [False, True, True], 2)


@pytest.mark.parametrize("factorization", ["loralib", "locon", "tucker"])
@pytest.mark.parametrize("name", ["Conv1d", "Conv3d"])
def test_defect_14_one_and_three_dimensions(name, factorization):
    """The factors of Conv1d and Conv3d have no shape that fits: forward always fails."""
    x = torch.randn(2, 4, *[5] * int(name[4]))
    with pytest.raises(RuntimeError, match="shape"):
        getattr(loralib, name)(4, 6, 3, r=2)(x)
    layer = draw_factors(getattr(fastlora, name)(4, 6, 3, r=2, factorization=factorization))
    expected = layer._conv_forward(x, layer.weight + layer.delta_weight(), layer.bias)
    y = layer(x)
    torch.testing.assert_close(y, expected)
    y.sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in layer.lora_parameters().values())
    torch.testing.assert_close(layer.eval()(x), expected)


@pytest.mark.parametrize("kernel", [(3, 3), (3, 2), (1, 4)])
def test_defect_15_any_kernel(kernel):
    """The kernel size has to be one int, so that it is square."""
    with pytest.raises(AssertionError):
        loralib.Conv2d(4, 6, kernel, r=2)
    x = torch.randn(2, 4, 5, 5)
    layer = draw_factors(fastlora.Conv2d(4, 6, kernel, r=2))
    y = layer(x)
    torch.testing.assert_close(y, F.conv2d(x, layer.weight + layer.delta_weight(), layer.bias))
    torch.testing.assert_close(layer.eval()(x), y)


def test_defect_16_a_convolution_has_the_plain_names():
    """The kernel is called conv.weight, which no pretrained checkpoint has."""
    plain = nn.Conv2d(4, 6, 3, stride=2)
    old, new = loralib.Conv2d(4, 6, 3, r=2, stride=2), fastlora.Conv2d(4, 6, 3, r=2, stride=2)
    assert old.load_state_dict(plain.state_dict(), strict=False).unexpected_keys
    assert not any(hasattr(old, name) for name in ("weight", "in_channels", "stride"))
    keys = new.load_state_dict(plain.state_dict(), strict=False)
    assert not keys.unexpected_keys and set(keys.missing_keys) == {"lora_A", "lora_B"}
    assert torch.equal(new.weight, plain.weight) and torch.equal(new.bias, plain.bias)
    assert isinstance(new, nn.Conv2d)
    assert (new.in_channels, new.stride) == (4, (2, 2))


def test_defect_17_the_bias_of_a_convolution():
    """bias="lora_only" leaves out the bias of a convolution."""
    for lora in (loralib, fastlora):
        model = nn.Sequential(lora.Conv2d(4, 6, 3, r=2), nn.Conv2d(6, 6, 3))
        lora.mark_only_lora_as_trainable(model, "lora_only")
        trainable = {n for n, p in model.named_parameters() if p.requires_grad}
        saved = set(lora.lora_state_dict(model, "lora_only"))
        expected = {"0.lora_A", "0.lora_B"} | ({"0.bias"} if lora is fastlora else set())
        assert trainable == saved == expected


def test_defect_18_each_group_has_factors_of_its_own():
    """The factors of a grouped convolution reach across its groups."""
    reach = {}
    for lora, options in ((loralib, {}), (fastlora, {"factorization": "locon"})):
        layer = draw_factors(lora.Conv2d(4, 6, 3, r=2, groups=2, **options))
        w = base_weight(layer).detach().clone()
        layer.eval()
        with_all = base_weight(layer) - w
        layer.train()
        rows = len(layer.lora_A) // 2
        layer.lora_A.data[:rows] = 0
        layer.eval()
        without = base_weight(layer) - w
        reach[lora] = [
            not torch.allclose(a, b, atol=1e-6)
            for a, b in zip(with_all.chunk(2), without.chunk(2), strict=True)
        ]
    assert reach == {loralib: [True, True], fastlora: [True, False]}
    assert not without.chunk(2)[0].any()
    assert torch.linalg.matrix_rank(without.chunk(2)[1].flatten(1)) == 2


@layers
def test_defect_19_a_layer_can_be_pickled(kind):
    """Without dropout a layer holds a lambda, which cannot be pickled."""
    make = LAYERS[kind][0]
    with pytest.raises((AttributeError, pickle.PicklingError)):
        pickle.dumps(make(loralib))
    layer = draw_factors(make(fastlora))
    x = input_of(kind)
    assert torch.equal(pickle.loads(pickle.dumps(layer))(x), layer(x))


def test_defect_20_factors_frozen_earlier_are_trained_again():
    """mark_only_lora_as_trainable never sets requires_grad of a factor."""
    count = {}
    for lora in (loralib, fastlora):
        model = nn.Sequential(lora.Linear(6, 10, r=2)).requires_grad_(False)
        lora.mark_only_lora_as_trainable(model)
        count[lora] = sum(p.requires_grad for p in model.parameters())
    assert count == {loralib: 0, fastlora: 2}


def test_defect_21_names_are_not_searched_for_parts():
    """Factors and biases are found by parts of names, and a wrong option is refused too late."""

    def build(lora):
        model = nn.Module()
        model.lora_like = nn.Linear(4, 4)
        model.relative_attention_bias = nn.Embedding(8, 2)
        model.proj = lora.Linear(4, 4, r=2)
        model.norm = nn.LayerNorm(4)
        return model

    factors = {"proj.lora_A", "proj.lora_B"}
    biases = {"proj.bias", "norm.bias"}
    for lora in (loralib, fastlora):
        model = build(lora)
        with pytest.raises((NotImplementedError, ValueError)):
            lora.mark_only_lora_as_trainable(model, "some")
        assert model.norm.weight.requires_grad == (lora is fastlora)
        for bias, expected in (("none", factors), ("all", factors | biases | {"lora_like.bias"})):
            model = build(lora)
            lora.mark_only_lora_as_trainable(model, bias)
            trainable = {n for n, p in model.named_parameters() if p.requires_grad}
            saved = set(lora.lora_state_dict(model, bias))
            assert (trainable == expected) == (saved == expected) == (lora is fastlora)


@pytest.mark.parametrize("blocks", [None, QV])
def test_defect_22_a_transposed_weight_is_contiguous(blocks, tmp_path):
    """A weight stored as (in, out) is a transposed view, which safetensors refuses to write."""

    def build(lora):
        if blocks is None:
            return lora.Linear(6, 12, r=2, fan_in_fan_out=True)
        return lora.MergedLinear(6, 12, r=2, enable_lora=blocks, fan_in_fan_out=True)

    path = tmp_path / "model.safetensors"
    with pytest.raises(ValueError, match="contiguous"):
        save_file(build(loralib).state_dict(), path)
    layer = build(fastlora)
    save_file(layer.state_dict(), path)
    assert all(torch.equal(t, load_file(path)[name]) for name, t in layer.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_defect_23_wide_factors_over_a_narrow_weight(dtype):
    """Factors in fp32 over a 16-bit weight fail in forward."""
    x = torch.randn(3, 6, dtype=dtype)
    old = loralib.Linear(6, 10, r=2, dtype=dtype)
    old.lora_A.data, old.lora_B.data = old.lora_A.data.float(), old.lora_B.data.float()
    with pytest.raises(RuntimeError, match="dtype"):
        old(x)
    layer = draw_factors(fastlora.Linear(6, 10, r=2, dtype=dtype, lora_dtype=torch.float32))
    y = layer(x)
    y.sum().backward()
    assert y.dtype == layer.weight.dtype == dtype
    assert layer.lora_A.grad.dtype == layer.lora_B.grad.dtype == torch.float32


def test_defect_24_max_norm_and_sparse():
    """max_norm rewrites the factor A at every lookup; sparse fails in backward."""
    index = torch.tensor([0, 3, 3])
    old = draw_factors(loralib.Embedding(9, 5, r=2, max_norm=0.1))
    A = old.lora_A.detach().clone()
    old(index)
    assert not torch.equal(old.lora_A, A)
    with pytest.raises(RuntimeError):
        loralib.Embedding(9, 5, r=2, sparse=True)(index).sum().backward()

    with pytest.raises(ValueError, match="max_norm"):
        fastlora.Embedding(9, 5, r=2, max_norm=0.1)
    with pytest.raises(ValueError, match="max_norm"):
        fastlora.Embedding.from_embedding(nn.Embedding(9, 5, max_norm=0.1), r=2)
    plain = fastlora.Embedding(9, 5, r=0, max_norm=0.1)
    assert plain(index).norm(dim=1).max() <= 0.1 + 1e-6
    grads = []
    for sparse in (False, True):
        layer = draw_factors(fastlora.Embedding(9, 5, r=2, sparse=sparse))
        layer(index).square().sum().backward()
        grads.append((layer.lora_A.grad, layer.lora_B.grad))
    assert grads[1][0].layout == torch.strided
    assert grads[1][0].shape == (2, 9) and not grads[1][0][:, 1].any()


def test_defect_25_a_lookup_costs_what_it_looks_up():
    """The factor is read through a transposed view, and its gradient has the size of the table."""
    V, D, r = 4096, 8, 2
    index = torch.tensor([5, 4095, 5])
    counts, grads = {}, {}
    for lora in (loralib, fastlora):
        torch.manual_seed(0)
        layer = draw_factors(lora.Embedding(V, D, r=r))
        with Log() as forward:
            y = layer(index)
        assert max(forward.new_bytes) < V * r * 4
        with Log() as backward:
            y.square().sum().backward()
        counts[lora] = sum(n >= V * r * 4 for n in backward.new_bytes)
        grads[lora] = layer.lora_A.grad
    torch.testing.assert_close(grads[fastlora], grads[loralib])
    assert grads[fastlora].count_nonzero(0).nonzero().flatten().tolist() == [5, 4095]
    assert counts[fastlora] <= counts[loralib]


def tied(lora, how):
    model = nn.Module()
    torch.manual_seed(0)
    if how == "inject":
        model.embed, model.head = nn.Embedding(9, 5), nn.Linear(5, 9, bias=False)
        model.head.weight = model.embed.weight
        with pytest.warns(UserWarning, match="will not be merged"):
            report = fastlora.inject(model, ["embed"], r=2)
        assert report.shared == ["embed"]
    else:
        model.embed, model.head = lora.Embedding(9, 5, r=2), nn.Linear(5, 9, bias=False)
        model.head.weight = model.embed.weight
    return draw_factors(model)


@pytest.mark.parametrize("how", ["inject", "mark"])
def test_defect_26_a_tied_head_is_left_alone(how):
    """Merging an embedding changes the output of the head that shares its table."""
    index, h = torch.tensor([0, 3, 8]), torch.randn(2, 5)
    old = tied(loralib, "mark")
    before = old.head(h)
    old.eval()
    assert not torch.allclose(old.head(h), before, atol=1e-2)

    model = tied(fastlora, how)
    if how == "mark":
        with pytest.warns(UserWarning, match="will not be merged"):
            fastlora.mark_only_lora_as_trainable(model)
    assert model.embed.weight_is_shared
    expected, weight = (model.embed(index), model.head(h)), model.head.weight.clone()
    model.eval()
    assert not model.embed.merged
    assert torch.equal(model.embed(index), expected[0]) and torch.equal(model.head(h), expected[1])
    with fastlora.merged(model):
        assert torch.equal(model.head(h), expected[1])
    with pytest.raises(ValueError, match="shared"):
        model.embed.merge()
    assert torch.equal(model.head.weight, weight)


@layers
def test_defect_27_the_initialisation_can_be_chosen(kind):
    """The initialisation is fixed, and that of an embedding surprises: A zero, B normal."""
    make = LAYERS[kind][0]
    options = {"init_lora_weights": "gaussian"}
    big = {
        "Linear": lambda **k: fastlora.Linear(2000, 10, r=4, **k),
        "MergedLinear": lambda **k: fastlora.MergedLinear(1000, 12, r=4, enable_lora=QV, **k),
        "Embedding": lambda **k: fastlora.Embedding(2000, 5, r=4, **k),
        "Conv2d": lambda **k: fastlora.Conv2d(200, 6, 3, r=4, **k),
    }[kind]
    torch.manual_seed(0)
    layer = big(**options)
    assert not layer.lora_B.any()
    A = layer.lora_A
    # five standard errors of the mean and of the standard deviation
    assert abs(A.mean()) < 5 * 0.25 / A.numel() ** 0.5
    assert abs(A.std() - 0.25) < 5 * 0.25 / (2 * A.numel()) ** 0.5
    # the default is loralib's
    for layer in (make(loralib), make(fastlora)):
        zero, drawn = (layer.lora_A, layer.lora_B)[:: 1 if kind == "Embedding" else -1]
        assert not zero.any() and drawn.any()
    with pytest.raises(ValueError, match="init_lora_weights"):
        make(fastlora, init_lora_weights="orthogonal")


@layers
def test_defect_28_built_from_a_module_and_told_apart(kind):
    """A layer cannot be built from the one it replaces, and its repr hides the rank."""
    base = {
        "Linear": nn.Linear(6, 10),
        "MergedLinear": nn.Linear(6, 12),
        "Embedding": nn.Embedding(9, 5),
        "Conv2d": nn.Conv2d(4, 6, 3),
    }[kind]
    make = {
        "Linear": lambda m: fastlora.Linear.from_linear(m, r=2, lora_alpha=6),
        "MergedLinear": lambda m: fastlora.MergedLinear.from_linear(m, 2, QV, lora_alpha=6),
        "Embedding": lambda m: fastlora.Embedding.from_embedding(m, r=2, lora_alpha=6),
        "Conv2d": lambda m: fastlora.Conv2d.from_conv(m, r=2, lora_alpha=6),
    }[kind]
    layer = make(base)
    x = input_of(kind)
    assert layer.weight is base.weight
    assert torch.equal(layer(x), base(x))
    assert "r=2" not in repr(LAYERS[kind][0](loralib))
    assert "r=2, lora_alpha=6, scaling=3" in repr(layer)
    assert not hasattr(getattr(loralib, kind), "from_linear")


@pytest.mark.parametrize("p", [0.0, 0.1])
def test_defect_29_one_pass_over_the_output(p):
    """Product, scaled product and dropped input are each written out; the last is kept."""
    M, K, N = 2048, 512, 512
    x = torch.randn(M, K)
    large, kept = {}, {}
    for lora in (loralib, fastlora):
        layer = draw_factors(lora.Linear(K, N, r=4, lora_dropout=p))
        with Log() as log:
            layer(x)
        large[lora] = sum(n >= M * N * 4 for n in log.new_bytes)
        storages = saved_storages(lambda layer=layer: layer(x.requires_grad_()))
        own = {t.untyped_storage().data_ptr() for t in (x, *layer.parameters())}
        kept[lora] = sum(n for at, n in storages.items() if at not in own)
    assert large[loralib] >= 3
    assert large[fastlora] <= 1
    # S in fp32, one bit an element for the mask, and the seed at most
    assert kept[fastlora] <= M * 4 * 4 + (M * K // 8 if p else 0) + 8
    assert p == 0 or kept[loralib] >= M * K * 4


def test_all_defects_have_a_test():
    numbers = {int(name.split("_")[2]) for name in globals() if name.startswith("test_defect_")}
    assert numbers == set(range(1, 30))
    assert all(f.__doc__ for name, f in globals().items() if name.startswith("test_defect_"))
