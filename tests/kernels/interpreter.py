"""A guard for Triton's interpreter, so that a kernel which passes on a CPU can be believed.

The interpreter computes bf16 on its bits, reads wherever a pointer points, returns zeros for what a
mask hid, skips assertions, rounds no operand to tf32 and runs programs in order. With the guard,

- bf16 is computed in fp32 and rounded to nearest even (reductions, scans and atomics refuse it);
- a lane that is not masked off stays inside one of the *views* that the kernel was given;
- what a masked load leaves out is poison, unless the kernel says what it should be;
- `tl.device_assert` fires, and so does an overflow of a signed integer below 64 bits;
- a dot refuses what a GPU's compiler refuses, and rounds fp32 to tf32 where it is told to;
- the programs of a launch run in a shuffled order, and none may touch what another has written.

Errors are raised as they are, not wrapped in Triton's InterpreterError; checks name the program.
"""

import contextlib
import dataclasses
import math
import os
import sys

import numpy as np

# Triton's interpreter, bound by install(): importing this file must not import Triton
triton_interpreter = None


def install(seed=0):
    """Turns the interpreter and this guard on; kernels decorated earlier are not interpreted."""
    global triton_interpreter
    os.environ["TRITON_INTERPRET"] = "1"
    import triton.runtime.interpreter as module

    triton_interpreter = module
    if is_active():
        return
    _interpret_library()
    builder = module.interpreter_builder = _derive(_Builder, module.InterpreterBuilder)()
    builder.options = dataclasses.replace(builder.options, debug=True)
    builder.codegen_fns["min_dot_size"] = _min_dot_size
    builder.seed, builder.launch, builder.races_allowed = seed, None, False
    module.TritonSemantic = _derive(_Semantic, module.TritonSemantic)
    module.interpreter_semantic = module.TritonSemantic(builder)
    module.GridExecutor = _derive(_Executor, module.GridExecutor)
    module.ReduceOps = _derive(_Reduction, module.ReduceOps)
    module.ScanOps = _derive(_Reduction, module.ScanOps)


def is_active():
    """Whether kernels run in the guarded interpreter."""
    module = sys.modules.get("triton.runtime.interpreter")
    return hasattr(module, "interpreter_builder") and hasattr(module.interpreter_builder, "launch")


@contextlib.contextmanager
def races_allowed():
    """For kernels whose programs wait for each other. Nothing changes without the guard."""
    if not is_active():
        yield
        return
    builder = sys.modules["triton.runtime.interpreter"].interpreter_builder
    before, builder.races_allowed = builder.races_allowed, True
    try:
        yield
    finally:
        builder.races_allowed = before


def round_to_bf16(x):
    """The bits of x, rounded to bf16's nearest value and to even between two."""
    bits = np.asarray(x, np.float32).view(np.uint32)
    rounded = (bits + (((bits >> 16) & 1) + 0x7FFF)) >> 16
    return np.where(np.isnan(x), 0x7FC0, rounded).astype(np.uint16)


def round_to_tf32(x):
    """A float32 array rounded to 10 bits of mantissa, ties away from zero as in cvt.rna.tf32."""
    rounded = ((x.view(np.uint32) + np.uint32(0x1000)) & np.uint32(0xFFFFE000)).view(np.float32)
    return np.where(np.isfinite(x), rounded, x)


# What may be touched, and who has


class View:
    """The bytes of a tensor argument: an interval, less the gaps that its strides leave."""

    def __init__(self, name, tensor):
        self.name, self.grain = name, tensor.element_size()
        self.start, self.region = tensor.data_ptr(), None
        # from the inside out: a level (step, length) says that of each `step` bytes, the first
        # `length` belong to the view
        self.levels, length = [], self.grain
        pairs = zip(tensor.stride(), tensor.shape, strict=True)
        for step, size in sorted((stride * self.grain, size) for stride, size in pairs):
            if size == 1:
                continue
            if step > length:
                self.levels.insert(0, (step, length))
            elif step < length:
                self.levels = []  # windows that overlap: what lies between them is let through
            length += (size - 1) * step
        self.stop = self.start + length

    def holds(self, lanes, width):
        """Which of the addresses are those of `width` bytes of this view."""
        offset = lanes - np.uint64(self.start)  # wraps around for what lies before the start
        inside = offset <= self.stop - self.start - width
        for step, length in self.levels:
            offset = offset % np.uint64(step)
            inside &= offset <= length - width
        return inside


class Region:
    """Memory that views cover, and which programs have touched each of its elements."""

    def __init__(self, start, stop, grain):
        self.start, self.grain = start, grain
        # 0: nobody, n: program n - 1, -1: several. Zeros cost no memory until they are touched
        size = (stop - start) // grain
        self.writer, self.reader = np.zeros(size, np.int32), np.zeros(size, np.int32)

    def record(self, what, lanes, width, program):
        """Notes one access, and returns another program that it races with (-1: several)."""
        me = program + 1
        cells = (lanes - np.uint64(self.start)).astype(np.int64) // self.grain
        if width > self.grain:
            cells = (cells[:, None] + np.arange(width // self.grain)).ravel()
        others = self.writer[cells]
        if what == "load":
            readers = self.reader[cells]
            self.reader[cells] = np.where((readers == 0) | (readers == me), me, -1)
        else:
            readers = self.reader[cells]
            others = np.where((others == 0) | (others == me), readers, others)
            self.writer[cells] = me
        others = others[(others != 0) & (others != me)]
        return None if others.size == 0 else int(others[0]) - (others[0] > 0)


class Launch:
    """The views that one launch of a kernel was given, and what became of them."""

    def __init__(self, arguments):
        self.views = []
        for name, value in arguments:
            self._add(name, value)
        self.views.sort(key=lambda view: view.start)

    def _add(self, name, value):
        if isinstance(value, tuple):
            for i, item in enumerate(value):
                self._add(f"{name}[{i}]", item)
        elif hasattr(value, "block_shape"):  # a TensorDescriptor
            self._add(name, value.base)
        elif hasattr(value, "data_ptr"):
            tensor = triton_interpreter._unwrap_tensor(value)
            if tensor.numel():
                self.views.append(View(name, tensor))

    def track(self):
        """From here on, programs are kept apart: one region for the views that overlap."""
        groups, stop = [], 0
        for view in self.views:
            if view.start >= stop:
                groups.append([])
            groups[-1].append(view)
            stop = max(stop, view.stop)
        for views in groups:
            start, stop = views[0].start, max(view.stop for view in views)
            grain = min(view.grain for view in views)
            if (stop - start) // grain <= MOST_CELLS:
                region = Region(start, stop, grain)
                for view in views:
                    view.region = region

    def check(self, what, lanes, width, builder):
        """Asserts that the addresses may be touched by the program that runs now."""
        first, last = int(lanes.min()), int(lanes.max()) + width
        for view in self.views:
            if first < view.start or view.stop < last:
                continue
            if not view.levels or view.holds(lanes, width).all():
                self._record(view.region, what, lanes, width, builder)
                return
        # lanes of several views, or of none
        free = np.ones(lanes.shape, bool)
        for view in self.views:
            mine = free & view.holds(lanes, width)
            if mine.any():
                self._record(view.region, what, lanes[mine], width, builder)
                free &= ~mine
        assert not free.any(), (
            f"{what}: {np.count_nonzero(free)} of {free.size} lanes are outside of every argument "
            f"in program {builder.grid_idx}; the first is {self._place(int(lanes[free][0]))}"
        )

    def _record(self, region, what, lanes, width, builder):
        if region is None or builder.races_allowed or what == "atomic":
            return
        other = region.record(what, lanes, width, builder.program)
        if other is not None:
            other = "several programs" if other < 0 else f"program {builder.index_of(other)}"
            name = next(view.name for view in self.views if view.region is region)
            raise AssertionError(
                f"race: a {what} of program {builder.grid_idx} touches what {other} "
                f"{'wrote' if what == 'load' else 'touched'}, in {name}"
            )

    def _place(self, address):
        def distance(view):
            return max(view.start - address, address - view.stop + 1, 0)

        if not self.views:
            return "at hand though no argument has elements"
        view = min(self.views, key=distance)
        if address < view.start:
            return f"{view.start - address} bytes before {view.name}"
        if address >= view.stop:
            return f"{address - view.stop} bytes past the end of {view.name}"
        return f"in a gap that the strides of {view.name} leave, or across its end"


# beyond this, as for a tensor of many gigabytes, races are not looked for
MOST_CELLS = 1 << 28


# What replaces parts of the interpreter. Each is mixed into a class of Triton's by install()


def _derive(mixin, base):
    return type(base.__name__, (mixin, base), {})


class _Builder:
    # programs

    def set_grid_dim(self, *sizes):
        super().set_grid_dim(*sizes)
        count = math.prod(sizes)
        self.order = np.random.default_rng(self.seed).permutation(count)
        if count > 1:
            if self.order[0] == 0:  # what others may wait for never comes first
                self.order = self.order[::-1]
            self.launch.track()

    def set_grid_idx(self, x, y, z):
        _, Y, Z = self.grid_dim
        self.program = int(self.order[(x * Y + y) * Z + z])
        super().set_grid_idx(*self.index_of(self.program))

    def index_of(self, program):
        return tuple(int(i) for i in np.unravel_index(program, self.grid_dim))

    def create_assert(self, condition, message):
        assert condition.data.all(), f"{message} (program {self.grid_idx})"

    # memory

    def create_masked_load(self, ptrs, mask, other, *args, **kwargs):
        kept = np.asarray(mask.data)  # without a handle where Triton 3.6 uses block pointers
        full = kept.all()
        element = triton_interpreter._get_np_dtype(ptrs.get_element_ty())
        self._check("load", ptrs, None if full else kept, element.itemsize)
        if other is None and not full:
            other = _poison(ptrs)
        return super().create_masked_load(ptrs, mask, other, *args, **kwargs)

    def create_masked_store(self, ptrs, value, mask, *args, **kwargs):
        kept = np.asarray(mask.data)
        self._check("store", ptrs, None if kept.all() else kept, value.data.itemsize)
        result = super().create_masked_store(ptrs, value, mask, *args, **kwargs)
        if ptrs.data.size > 1:
            data = value.data
            stored = triton_interpreter._interpreter.load(ptrs.data, kept, data, data.dtype)
            assert stored.tobytes() == data.tobytes(), (
                f"store: lanes of one store write different values to one address, in program "
                f"{self.grid_idx}"
            )
        return result

    def create_atomic_rmw(self, op, ptr, val, mask, *args):
        self._check_atomic(ptr, np.asarray(mask.data))
        return super().create_atomic_rmw(op, ptr, val, mask, *args)

    def create_atomic_cas(self, ptr, *args):
        self._check_atomic(ptr, None)
        return super().create_atomic_cas(ptr, *args)

    def _check_atomic(self, ptr, kept):
        if ptr.get_element_ty().is_bf16():
            raise NotImplementedError("the interpreter computes atomics of bf16 wrongly")
        width = triton_interpreter._get_np_dtype(ptr.get_element_ty()).itemsize
        self._check("atomic", ptr, kept, width)

    def _check(self, what, ptrs, kept, width):
        lanes = ptrs.data
        lanes = lanes.ravel() if kept is None else lanes[np.broadcast_to(kept, lanes.shape)]
        if lanes.size:
            self.launch.check(what, lanes, width, self)

    # arithmetic

    def get_bf16(self, value):  # missing in Triton 3.6
        return _narrow(self.get_fp32(value))

    def cast_impl(self, src, dst_type):
        source, target = src.dtype.scalar, dst_type.scalar
        if source.is_bf16() and not target.is_bf16():
            return super().cast_impl(_widen(src), dst_type)
        if target.is_bf16() and not source.is_bf16():
            return _narrow(super().cast_impl(src, triton_interpreter.tl.float32))
        return super().cast_impl(src, dst_type)

    def binary_op(self, lhs, rhs, op):
        if not _is_bf16(lhs):
            return super().binary_op(lhs, rhs, op)
        result = op(_widen(lhs).data, _widen(rhs).data)
        if result.dtype == bool:
            return type(lhs)(result, triton_interpreter.tl.int1)
        return type(lhs)(round_to_bf16(result), lhs.dtype.scalar)

    def unary_op(self, arg, op):
        if not _is_bf16(arg):
            return super().unary_op(arg, op)
        return _narrow(super().unary_op(_widen(arg), op))

    def ternary_op(self, lhs, rhs, other, op):
        if op is np.where or not _is_bf16(other):  # choosing needs no arithmetic
            return super().ternary_op(lhs, rhs, other, op)
        return _narrow(super().ternary_op(_widen(lhs), _widen(rhs), _widen(other), op))

    def create_fma(self, x, y, z):
        if not _is_bf16(z):
            return super().create_fma(x, y, z)
        # exact but for the last sum
        return _narrow(super().create_fma(_widen(x), _widen(y), _widen(z)))

    # of a number and NaN, the number: Triton 3.6 lets NaN through

    def create_minnumf(self, lhs, rhs):
        return self.binary_op(lhs, rhs, np.fmin)

    def create_maxnumf(self, lhs, rhs):
        return self.binary_op(lhs, rhs, np.fmax)

    def create_clampf(self, arg, lo, hi, propagate_nans):
        if propagate_nans.name == "NONE":
            return self.create_minnumf(self.create_maxnumf(arg, lo), hi)
        return super().create_clampf(arg, lo, hi, propagate_nans)

    def create_umulhi(self, lhs, rhs):
        if lhs.data.dtype.itemsize != 4:
            return super().create_umulhi(lhs, rhs)
        # Triton 3.6 extends the sign of int32
        product = lhs.data.view(np.uint32).astype(np.uint64) * rhs.data.view(np.uint32)
        high = (product >> np.uint64(32)).astype(np.uint32)
        return type(lhs)(high.view(lhs.data.dtype), lhs.dtype.scalar)

    def create_dot(self, a, b, d, input_precision, *args):
        if _is_bf16(a):
            a, b = _widen(a), _widen(b)
        elif a.data.dtype == np.float32 and input_precision.name == "TF32":
            a, b = (type(h)(round_to_tf32(h.data), h.dtype) for h in (a, b))
        return super().create_dot(a, b, d, input_precision, *args)


class _Semantic:
    def binary_op_sanitize_overflow_impl(self, lhs, rhs, binary_op):
        ty = lhs.type.scalar
        # what is unsigned wraps on purpose, as Philox does
        if not ty.is_int_signed() or ty.int_bitwidth == 64:
            return
        op = {"add": np.add, "sub": np.subtract, "mul": np.multiply}[binary_op.__name__]
        exact = op(lhs.handle.data, rhs.handle.data, dtype=np.int64)
        limit = 1 << (ty.int_bitwidth - 1)
        assert exact.size == 0 or (-limit <= exact.min() and exact.max() < limit), (
            f"{ty} overflow in {binary_op.__name__} (program {self.builder.grid_idx})"
        )


class _Reduction:
    def apply_impl(self, tensors):
        if any(tensor.dtype.scalar.is_bf16() for tensor in tensors):
            raise NotImplementedError(
                "a reduction or scan in bf16 rounds at every step, in an order that no test can "
                "rely on: use x.to(tl.float32)"
            )
        return super().apply_impl(tensors)


class _Executor:
    def _init_args_hst(self, args, kwargs):
        args, kwargs = super()._init_args_hst(args, kwargs)
        named = [*zip(self.arg_names, args, strict=False), *kwargs.items()]
        triton_interpreter.interpreter_builder.launch = Launch(named)
        return args, kwargs

    def __call__(self, *args, **kwargs):
        try:
            with np.errstate(all="ignore"):  # a GPU does not warn
                return super().__call__(*args, **kwargs)
        except triton_interpreter.InterpreterError as error:
            while isinstance(error, triton_interpreter.InterpreterError) and error.__cause__:
                error = error.__cause__
            raise error from None
        finally:
            triton_interpreter.interpreter_builder.launch = None


def _is_bf16(handle):
    # the handle of a comparison can keep the dtype of its operands
    return handle.data.dtype == np.uint16 and handle.dtype.scalar.is_bf16()


def _widen(handle):
    data = (handle.data.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return type(handle)(data, triton_interpreter.tl.float32)


def _narrow(handle):
    return type(handle)(round_to_bf16(handle.data), triton_interpreter.tl.bfloat16)


def _poison(ptrs):
    ty = ptrs.get_element_ty()
    dtype = triton_interpreter._get_np_dtype(ty)
    if dtype.kind == "f":
        value = np.nan
    elif ty.is_bf16():
        value = 0x7FC0
    elif dtype.kind == "b":
        value = True
    else:
        value = int.from_bytes(b"\x5a" * dtype.itemsize, "little")
    return triton_interpreter.TensorHandle(np.full(ptrs.data.shape, value, dtype), ty)


def _min_dot_size(lhs_type, rhs_type):
    """The least M, N, K for a GPU: the strictest of the supported versions of Triton."""
    return 1, 1, 32 if lhs_type.scalar.primitive_bitwidth == 8 else 16


def _interpret_library():
    """Interprets the part of Triton's library that is a kernel itself, if it came before us."""
    from triton.runtime.jit import JITFunction

    tensor, interpreted = triton_interpreter.tl.tensor, {}
    modules = [m for name, m in sys.modules.items() if name.startswith("triton.language")]
    for holder in [*modules, tensor]:
        for name, value in list(vars(holder).items()):
            if isinstance(value, JITFunction):
                # by identity: the hash of a JITFunction reads its source
                if id(value) not in interpreted:
                    interpreted[id(value)] = triton_interpreter.InterpretedFunction(value.fn)
                function = interpreted[id(value)]
                # what is no plain function would not become a method
                setattr(holder, name, _as_method(function) if holder is tensor else function)


def _as_method(function):
    return lambda *args, **kwargs: function(*args, **kwargs)
