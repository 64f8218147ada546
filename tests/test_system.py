"""The layers inside PyTorch's machinery: compilers, checkpointing, processes, scaling, copies."""

import copy
import pickle
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.backends.debugging import boxed_nop
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import fastlora
from fastlora import testing
from fastlora.functional import lora_linear

OPTIONS = {"r": 3, "lora_dropout": 0.3, "init_lora_weights": False}
BLOCKS = {"enable_lora": [True, False, True], **OPTIONS}


def conv2d(factorization):
    return fastlora.Conv2d(3, 6, 3, factorization=factorization, padding=1, **OPTIONS)


# a layer, the plain one, and a shape of the input for one sample (None: an index)
LAYERS = {
    "Linear": (lambda: fastlora.Linear(12, 8, **OPTIONS), lambda: nn.Linear(12, 8), (12,)),
    "lora_bias": (
        lambda: fastlora.Linear(12, 8, lora_bias=True, **OPTIONS),
        lambda: nn.Linear(12, 8),
        (12,),
    ),
    "fan_in_fan_out": (
        lambda: fastlora.Linear(12, 8, fan_in_fan_out=True, **OPTIONS),
        lambda: nn.Linear(12, 8),
        (4, 12),
    ),
    "MergedLinear": (
        lambda: fastlora.MergedLinear(12, 18, interleave=2, **BLOCKS),
        lambda: nn.Linear(12, 18),
        (12,),
    ),
    "Embedding": (
        lambda: fastlora.Embedding(9, 5, r=3, init_lora_weights=False),
        lambda: nn.Embedding(9, 5),
        None,
    ),
    "Conv2d loralib": (
        lambda: conv2d("loralib"),
        lambda: nn.Conv2d(3, 6, 3, padding=1),
        (3, 6, 6),
    ),
    "Conv2d locon": (lambda: conv2d("locon"), lambda: nn.Conv2d(3, 6, 3, padding=1), (3, 6, 6)),
    "Conv2d tucker": (lambda: conv2d("tucker"), lambda: nn.Conv2d(3, 6, 3, padding=1), (3, 6, 6)),
    "Conv1d": (
        lambda: fastlora.Conv1d(
            4, 6, 3, factorization="locon", groups=2, padding=1, padding_mode="reflect", **OPTIONS
        ),
        lambda: nn.Conv1d(4, 6, 3, groups=2, padding=1, padding_mode="reflect"),
        (4, 9),
    ),
    "Conv3d": (
        lambda: fastlora.Conv3d(2, 4, 3, factorization="locon", padding="same", **OPTIONS),
        lambda: nn.Conv3d(2, 4, 3, padding="same"),
        (2, 4, 4, 4),
    ),
}


@pytest.fixture(params=LAYERS)
def case(request):
    """A layer, its plain sibling and a function that makes an input of n samples."""
    build, plain, shape = LAYERS[request.param]
    torch.manual_seed(0)

    def make_input(n):
        return torch.randint(0, 9, (n, 4)) if shape is None else torch.randn(n, *shape)

    torch._dynamo.reset()
    yield build(), plain(), make_input
    torch._dynamo.reset()


def step(call, module, x):
    """Output and gradients of one training step, always with the same dropout."""
    x = x.clone().requires_grad_(x.is_floating_point())
    module.zero_grad()
    torch.manual_seed(3)
    y = call(x)
    y.square().sum().backward()
    grads = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    return {"y": y.detach(), "x": x.grad, **grads}


def by_pickle(module):
    return pickle.loads(pickle.dumps(module))


def outputs(x, *calls):
    """Of each, with the same dropout."""
    for call in calls:
        torch.manual_seed(3)
        yield call(x)


def assert_same(got, expected):
    assert got.keys() == expected.keys()
    for name, t in expected.items():
        assert (got[name] is None) == (t is None), name
        assert t is None or torch.equal(got[name], t), name


# ---- torch's fused paths, which read weights and call no layer

HOWS = ["inject", "by hand", "by hand in eval mode"]


def encoder_layer(how, options):
    """An encoder layer in eval mode, whose linear layers are replaced."""
    model = nn.TransformerEncoderLayer(8, 2, 8, dropout=0.0, batch_first=True)
    options = {"r": 3, "init_lora_weights": False, **options}
    if how == "inject":
        fastlora.inject(model, ["linear1", "linear2"], **options)
    else:
        model.train(how == "by hand")
        model.linear1, model.linear2 = (fastlora.Linear(8, 8, **options) for _ in range(2))
    return model if how == "by hand in eval mode" else model.eval()


@pytest.mark.parametrize("copied", [lambda m: m, copy.deepcopy, by_pickle])
@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize(
    "options", [{}, {"merge_weights": False}, {"lora_bias": True}, {"fan_in_fan_out": True}]
)
def test_fused_paths_pass_no_update_by(options, how, copied, monkeypatch):
    """They are taken where weight and bias are all that a layer is, and nowhere else."""
    if how == "inject" and "fan_in_fan_out" in options:
        pytest.skip("torch has no layer with such a weight")
    model, calls = copied(encoder_layer(how, options)), []
    forward = fastlora.Linear.forward
    monkeypatch.setattr(
        fastlora.Linear, "forward", lambda self, x: calls.append(self) or forward(self, x)
    )
    called = [model.linear1, model.linear2]
    with torch.no_grad():
        model(torch.randn(2, 3, 8))
        assert calls == ([] if not options and how != HOWS[2] else called)
        calls.clear()
        with fastlora.merged(model):
            model(torch.randn(2, 3, 8))
        assert calls == ([] if "merge_weights" in options or not options else called)
        calls.clear()
        for layer in called:
            layer.unmerge()
        model(torch.randn(2, 3, 8))
        assert calls == called


@pytest.mark.parametrize("merge_weights", [True, False])
def test_a_compiled_fused_path_passes_no_update_by(merge_weights):
    torch._dynamo.reset()
    model, called = encoder_layer("inject", {"merge_weights": merge_weights}), set()

    def keep(graph, inputs):
        called.update(str(node.target) for node in graph.graph.nodes)
        return graph

    with torch.no_grad():
        torch.compile(model, backend=keep, fullgraph=True)(torch.randn(2, 3, 8))
    assert any("_transformer_encoder_layer_fwd" in name for name in called) == merge_weights


# ---- torch.compile and torch.export

FEW = pytest.mark.parametrize("case", ["Linear", "Embedding", "Conv2d locon"], indirect=True)
MORE = ["Linear", "MergedLinear", "Embedding", "Conv2d locon", "Conv2d loralib"]


def test_compile(case):
    """One graph, forward and backward, and eager's bits, dropout and all."""
    layer, _, make_input = case
    x = make_input(5)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    assert_same(step(compiled, layer, x), step(layer, layer, x))


@pytest.mark.parametrize("case", MORE, indirect=True)
def test_compile_for_any_batch(case):
    """As many compilations as the plain layer needs."""
    layer, plain, make_input = case
    compilations = []
    for module in (plain, layer):
        torch._dynamo.reset()
        counter = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(module, backend=counter, fullgraph=True)
        for n in (5, 7, 11):
            x = make_input(n)
            assert_same(step(compiled, module, x), step(module, module, x))
        compilations.append(counter.frame_count)
    assert compilations[1] <= compilations[0]


@FEW
def test_compile_sees_a_new_scaling(case):
    layer, _, make_input = case
    x, counter = make_input(5), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    for scaling in (1.0, 0.5, 2.0, 3.0):
        layer.scaling = scaling
        assert_same(step(compiled, layer, x), step(layer, layer, x))
    # torch before 2.13 compiles what is given a number anew for each
    assert counter.frame_count <= 2 or torch.__version__ < "2.13"


@FEW
def test_compile_sees_merging(case):
    layer, _, make_input = case
    x, seen = make_input(5), []
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for mode in (True, False, True):
        layer.train(mode)
        assert torch.equal(*outputs(x, compiled, layer))
        seen.append(layer.merged)
    assert seen == [False, True, False]


@pytest.mark.parametrize("how", ["argument", "context"])
def test_compile_with_a_backend_by_name(how, backend_name):
    torch._dynamo.reset()
    argument, context = (backend_name if how == at else "auto" for at in ("argument", "context"))
    layer = fastlora.Linear(12, 8, backend=argument, **OPTIONS)
    x = torch.randn(5, 12)
    with fastlora.use_backend(context):
        compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
        assert_same(step(compiled, layer, x), step(layer, layer, x))


@pytest.mark.parametrize("case", ["Linear", "MergedLinear"], indirect=True)
def test_programs_run_on_the_chosen_backend(case, backend):
    """Compiled and exported, for any batch: by the backend's operators, where it has any."""
    layer, _, make_input = case
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return boxed_nop(graph, inputs)

    compiled = torch.compile(layer, backend=aot_autograd(fw_compiler=keep), fullgraph=True)
    batch = ({0: torch.export.Dim("batch", min=2, max=64)},)
    program = torch.export.export(layer, (make_input(5),), dynamic_shapes=batch).module()
    for n in (5, 7, 11):
        x = make_input(n)
        assert_same(step(compiled, layer, x), step(layer, layer, x))
        assert torch.equal(*outputs(x, program, layer))
    assert len(graphs) == 4, "a forward and a backward for 5 rows, and for any number"
    for graph in (*graphs, program):
        operators = {str(n.target) for n in graph.graph.nodes if "fastlora" in str(n.target)}
        direction = "backward" if graph in graphs[1::2] else "forward"
        namespace = {
            "native": "fastlora",
            "triton": "fastlora_triton",
            "emulated": "fastlora_emulated",
        }.get(backend)
        expected = {f"{namespace}.{direction}.default"} if namespace else set()
        assert operators == expected


@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16])
def test_compile_under_autocast(autocast):
    torch._dynamo.reset()
    layer, x = fastlora.Linear(12, 8, **OPTIONS), torch.randn(5, 12)

    def function(x):
        with torch.autocast("cpu", autocast):
            return layer(x)

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    assert_same(step(compiled, layer, x), step(function, layer, x))


@pytest.mark.parametrize("path", ["reference", "native"], indirect=True)
def test_compile_within_autocast(case, path):
    """Its backward is traced under autocast, too, and computes as that of eager all the same."""
    layer, _, make_input = case
    x = make_input(5)

    def within_autocast(function):
        def call(*args):
            with torch.autocast("cpu", torch.bfloat16):
                return function(*args)

        return call

    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    got, expected = (step(within_autocast(f), layer, x) for f in (compiled, layer))
    assert_same(got, expected)


def test_compile_with_checkpointing():
    torch._dynamo.reset()
    layer, x = fastlora.Linear(12, 8, **OPTIONS), torch.randn(5, 12)

    def function(x):
        return checkpoint(layer, x, use_reentrant=False)

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    assert_same(step(compiled, layer, x), step(layer, layer, x))


@pytest.mark.slow
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_inductor(p):
    """As right as eager, by the rule of ``fastlora.testing``, with the mask of the same seed."""
    torch._dynamo.reset()
    inputs = testing.make_inputs(64, 96, 80, 8, p=p)
    x, A, B = (t.clone().requires_grad_() for t in (inputs.x, inputs.lora_A, inputs.lora_B))
    compiled = torch.compile(lora_linear, fullgraph=True)
    options = {"scaling": inputs.scaling, "p": p, "seed": inputs.seed}
    y = compiled(x, inputs.weight, A, B, bias=inputs.bias, **options)
    y.backward(inputs.grad)
    got = {"y": y.detach(), "d_x": x.grad, "d_lora_A": A.grad, "d_lora_B": B.grad}
    plain, exact = testing.composition(inputs), testing.truth(inputs)
    testing.assert_no_worse(got, *({name: of[name] for name in got} for of in (plain, exact)))


def test_export(case):
    """With a batch of any size; the program draws its dropout from torch's generator too."""
    layer, _, make_input = case
    batch = ({0: torch.export.Dim("batch", min=2, max=64)},)
    program = torch.export.export(layer, (make_input(5),), dynamic_shapes=batch).module()
    for n in (5, 2, 64):
        assert torch.equal(*outputs(make_input(n), program, layer))


# ---- checkpointing and functional calls


class Net(nn.Module):
    """An MLP with every kind of linear layer and dropout in it."""

    def __init__(self, **changed):
        super().__init__()
        options, blocks = {**OPTIONS, **changed}, {**BLOCKS, **changed}
        self.embed = fastlora.Embedding(9, 6, r=2, init_lora_weights=False)
        self.up = fastlora.Linear(6, 12, **options)
        self.qkv = fastlora.MergedLinear(12, 12, **blocks)
        self.down = fastlora.Linear(12, 6, fan_in_fan_out=True, **options)

    def block(self, h):
        return self.down(F.relu(self.qkv(F.relu(self.up(h)))))

    def forward(self, index, run=lambda function, h: function(h)):
        h = self.embed(index)
        return run(self.block, run(self.block, h))


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net()


@pytest.fixture
def index():
    return torch.arange(9).view(3, 3)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(net, index, reentrant):
    """The recomputed forward draws the masks of the first."""

    def checkpointed(index):
        return net(index, lambda function, h: checkpoint(function, h, use_reentrant=reentrant))

    expected = step(net, net, index)
    assert_same(step(checkpointed, net, index), expected)
    assert all(t.any() for name, t in expected.items() if "lora_" in name)


def test_functional_call(net, index):
    other = copy.deepcopy(net)
    with torch.no_grad():
        for name, p in other.named_parameters():
            if "lora_" in name:
                p.add_(0.5)
    parameters = dict(other.named_parameters())

    def call(index):
        return torch.func.functional_call(net, parameters, (index,))

    expected = step(other, other, index)
    assert_same(step(call, other, index), expected)
    assert not torch.equal(expected["y"], step(net, net, index)["y"])


# ---- training loops


def test_gradient_accumulation():
    torch.manual_seed(0)
    net, steps = Net(lora_dropout=0.0), []
    for index in (torch.arange(4), torch.arange(4, 9)):
        steps.append(step(net, net, index))
    net.zero_grad()
    for index in (torch.arange(4), torch.arange(4, 9)):
        net(index).square().sum().backward()
    for name, p in net.named_parameters():
        if p.requires_grad:
            assert torch.equal(p.grad, steps[0][name] + steps[1][name]), name


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_overflow_shows_in_every_factor(case, value):
    """So that a gradient scaler sees it."""
    layer, _, make_input = case
    y = layer(make_input(5))
    grad = torch.ones_like(y)
    grad.view(-1)[0] = value
    y.backward(grad)
    for name, p in layer.lora_parameters().items():
        assert not p.grad.isfinite().all(), name


@pytest.mark.parametrize("factor", [1.0, float("inf")])
def test_grad_scaler(net, index, factor):
    """A step with Inf in it is skipped, one without is made."""
    parameters = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.5)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    before = [p.detach().clone() for p in parameters]
    scaler.scale((net(index) * factor).sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    changed = [not torch.equal(a, b) for a, b in zip(before, parameters, strict=True)]
    assert changed == [factor == 1.0] * len(parameters)
    assert scaler.get_scale() == (8.0 if factor == 1.0 else 4.0)


@pytest.mark.parametrize("merged", [False, True])
def test_deepcopy_of_a_model_in_training(net, index, merged):
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=0.1)
    step(net, net, index)
    optimizer.step()
    base = net.up.weight.detach().clone()
    net.train(not merged)
    twin = copy.deepcopy(net)
    assert twin.up.merged == merged
    net.train()
    twin.train()
    assert torch.equal(twin.up.weight, base)
    expected = step(net, net, index)
    assert_same(step(twin, twin, index), expected)
    with torch.no_grad():
        for p in twin.parameters():
            p.zero_()
    assert_same(step(net, net, index), expected)


@pytest.mark.parametrize("mode", [True, False])
def test_replicas_of_data_parallel(case, mode):
    """Their parameters are plain attributes, and theirs alone."""
    layer, _, make_input = case
    layer.train(mode)
    replica = layer._replicate_for_data_parallel()
    for name, p in layer.named_parameters():
        setattr(replica, name, p.clone())
    assert torch.equal(*outputs(make_input(5), layer, replica))


# ---- distributed: two processes on gloo against one, on integers so that sums are exact

SCRIPT = """
import os
import sys
import warnings

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

import fastlora


def build():
    torch.manual_seed(0)
    net = nn.Sequential(
        fastlora.Linear(6, 8, r=2, lora_alpha=4),
        nn.ReLU(),
        fastlora.MergedLinear(8, 12, r=2, lora_alpha=4, enable_lora=[True, False, True]),
    )
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randint(-1, 2, p.shape))
    fastlora.mark_only_lora_as_trainable(net)
    return net


def gradients(net):
    found = {}
    for name, p in net.named_parameters():
        if p.grad is not None:
            whole = p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
            found[name.removeprefix("module.")] = whole
    return found


def shard(net, **options):
    for layer in (net[0], net[2]):
        fully_shard(layer, **options)
    return fully_shard(net, **options)


def adapters(net, alone, path):
    # what is sharded is never merged, and its adapter is saved and loaded whole
    x = torch.arange(48.0).view(8, 6)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        net.eval()
        assert sum("its weight is a DTensor" in str(w.message) for w in caught) == 2
        with fastlora.merged(net):
            assert not net[0].merged and torch.equal(net(x), alone(x))
        net.train()
    # the root group stays whole between a forward and the next
    root = fully_shard(build())
    root.eval()(x)
    root.eval().reshard()
    assert not root[0].merged and torch.equal(root(x), alone(x))
    for refused in (net[0].merge, net[0].delta_weight):
        try:
            refused()
        except ValueError as error:
            assert "DTensor" in str(error)
        else:
            raise AssertionError("nothing was raised")
    with torch.no_grad():
        for p in alone.parameters():
            p.add_(1)
    fastlora.adapters.save(net, path)
    fastlora.adapters.load(alone, path)
    fastlora.adapters.load(net, alone.state_dict())
    for name, p in net.named_parameters():
        assert torch.equal(p.full_tensor(), alone.get_parameter(name)), name


def main(rank, path):
    dist.init_process_group("gloo", init_method="file://" + path, rank=rank, world_size=2)
    torch.manual_seed(1)
    x = torch.randint(-1, 2, (8, 6)).float()
    alone = build()
    alone(x).sum().backward()
    expected = gradients(alone)
    assert expected and all(name.rpartition(".")[2].startswith("lora_") for name in expected)
    mixed = MixedPrecisionPolicy(torch.bfloat16, torch.float32, torch.float32)
    for wrap in (
        DistributedDataParallel,
        shard,
        lambda net: shard(net, mp_policy=mixed),
    ):
        net = wrap(build())
        # the mean over processes of twice the sum
        (2 * net(x.chunk(2)[rank]).sum()).backward()
        found = gradients(net)
        assert found.keys() == expected.keys()
        for name, g in expected.items():
            assert found[name].dtype == g.dtype
            assert torch.equal(found[name], g), name
    adapters(shard(build()), build(), path + ".safetensors")
    dist.barrier()
    # the backend's threads may outlive the interpreter, which then aborts
    os._exit(0)


if __name__ == "__main__":
    torch.multiprocessing.spawn(main, args=sys.argv[1:], nprocs=2)
    print("equal")
"""


@pytest.mark.slow
def test_distributed(tmp_path):
    """DDP, FSDP2, FSDP2 in bf16 with fp32 outputs and reductions, adapters of what is sharded."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    command = [sys.executable, script, tmp_path / "store"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout == "equal\n"
