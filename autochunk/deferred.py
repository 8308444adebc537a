"""Deferred logits: a tensor that is computed when somebody uses it.

A model that returns its logits next to its loss gets a :class:`DeferredTensor` in their place.
Reading its metadata (shape, dtype, device) costs nothing. Its first use computes the value, and
**from then on the same Python object is an ordinary** ``torch.Tensor``, as if the model had
returned it.

Terms
    formula     how the value is computed: a graph of ATen ops and its inputs, kept alive.
    plain       the value's ordinary tensor. Its place in the autograd graph is final from the
                start; until the value is there, its storage holds one element.
    wrapper     the tensor without storage that users hold, an identity of ``plain`` to autograd.

How each caller gets the value
    Python          ``__torch_function__`` computes it and swaps the wrapper's innards for
                    ``plain``'s before the function runs. A view that a loss was computed from is
                    swapped for one that autograd knows as a view when it is modified.
    C++             (custom autograd Functions, TorchScript, extensions) has recorded the wrapper
                    in the autograd graph already, whose gradient flows on to ``plain``;
                    ``__torch_dispatch__`` then puts the value in its place.
    torch.compile   sees a traceable wrapper subclass with one inner tensor: an outline where Dynamo
                    asks (its guards read metadata only), the value where compiled code does.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from math import prod
from types import FrameType
from typing import Any, TypeVar

import torch
import torch.overrides
import torch.utils._pytree as pytree
from torch import Tensor, fx
from torch._C._dynamo.eval_frame import set_code_exec_strategy
from torch._dynamo import compiled_autograd
from torch._dynamo.types import FrameAction, FrameExecStrategy
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch._guards import TracingContext
from torch.autograd.graph import GradientEdge, get_gradient_edge, saved_tensors_hooks
from torch.utils._python_dispatch import _disable_current_modes, return_and_correct_aliasing

from autochunk.kept import Token, remember
from autochunk.modes import claimed


class StaleError(RuntimeError):
    """A deferred tensor was used after one of its inputs had been modified in place."""


F = TypeVar("F", bound=Callable[..., Any])


def never_compiled(function: F) -> F:
    """Dynamo compiles neither the function nor what it calls, wherever it is called from.

    A frame that Dynamo skips or resumes calls PyTorch, and PyTorch calls us; without this Dynamo
    would take our code for the user's. (It may still inline the function into a graph.)
    """
    skip = FrameExecStrategy(FrameAction.SKIP, FrameAction.SKIP)
    set_code_exec_strategy(function.__code__, skip)
    return function


def defer(
    graph: fx.GraphModule,
    inputs: Sequence[Any],
    shape: Sequence[int],
    strides: Sequence[int],
    val: Tensor,
    requires_grad: bool,
    symbolic: Sequence[tuple[int, ...] | None],
    compiler: Any = None,
    claims: bool = False,
) -> DeferredTensor:
    """A deferred tensor.

    Args:
        graph: Computes the value from ``inputs`` (ATen ops, autocast already applied).
        inputs: Tensors (kept alive, not copied) and sizes.
        shape, strides: Of the value.
        val: A fake tensor with its dtype and device.
        requires_grad: Whether the value has a gradient.
        symbolic: For each input the dimensions that may have another size; None for a size.
        compiler: Compiles functions of the logits (``recording.Programs``); None: they are
            computed.
        claims: Whether the value says that it has a gradient, and has none (``modes.py``).
    """
    formula = Formula(graph, inputs, requires_grad, shape, val, symbolic, compiler, claims)
    return make(formula, shape, strides, val, requires_grad)


def make(
    formula: Any, shape: Sequence[int], strides: Sequence[int], val: Any, requires_grad: bool
) -> DeferredTensor:
    """A deferred tensor with a formula; ``val`` has its dtype and device."""
    with torch.set_grad_enabled(requires_grad):
        plain = _Deferred.apply(formula, tuple(shape), val, *formula.tensors)
        made = _Identity.apply(plain, formula, tuple(strides))
    if not requires_grad:
        made._token = remember(formula)
    return made


def _compute(func: Any, args: Any, kwargs: Any) -> Any:
    return NotImplemented


#: What is tried before a value is computed (``recording.py``).
on_use: Callable[[Any, Any, Any], Any] = _compute


class DeferredTensor(Tensor):
    """A tensor that is computed on first use, and an ordinary ``torch.Tensor`` from then on.

    Attributes:
        _plain: The value's tensor.
        _formula: Computes the value, a :class:`Formula` or what ``recording.py`` has in its place;
            None in a compiler's copies, made of a tensor of its own.
    """

    _plain: Tensor
    _formula: Any
    _expanded: Tensor
    _token: Token
    _views: list[weakref.ref[DeferredTensor]]

    @never_compiled
    def materialize(self) -> Tensor:
        """Computes the value. Any other use of the tensor does so, too.

        Returns:
            The same object, which is an ordinary tensor now. (While C++ code holds on to the
            wrapper: another tensor, with the same value, storage and gradient.)

        Raises:
            StaleError: if an input was modified in place since.
        """
        return self._become(written=True)

    @never_compiled
    def _become(self, written: bool) -> Tensor:
        """Computes the value for a use; ``written``: whether that modifies it in place.

        A view whose place in the autograd graph is that of ``plain`` stays a wrapper until then: it
        is no view to autograd, and must be one when it is modified.
        """
        with _LOCK:
            if type(self) is not DeferredTensor:  # another thread was faster
                return self
            formula = self._formula
            if formula is None:
                return self._plain
            formula.seen = True
            if self.is_shared_with_cpp():
                return self._with_history(self._value)
            ordinary = formula.ordinary(self._plain, written)
            if type(self) is not DeferredTensor:  # the whole has done it
                return self
            value = self._with_history(ordinary)
            retained = self._plain.retains_grad
            if formula.is_view and not written and (ordinary is self._plain or retained):
                return value
            try:
                torch._C._swap_tensor_impl(self, value)
            except RuntimeError:  # C++ code holds a weak reference
                return self._with_history(self._value)
            views = self.__dict__.pop("_views", ())
            del self._plain, self._formula
            self.__dict__.pop("_expanded", None)
            self.__dict__.pop("_token", None)
            self.__class__ = Tensor
            if retained and not self.retains_grad:
                self.retain_grad()
            for reference in views:  # nobody tells us of what is done to an ordinary tensor
                view = reference()
                if type(view) is DeferredTensor and (written or not view._formula.used):
                    view._become(written)
            return self

    @never_compiled
    def has_view(self, view: DeferredTensor) -> None:
        """Remembers a deferred view, which becomes one to autograd when this tensor has a value."""
        self.__dict__.setdefault("_views", []).append(weakref.ref(view))

    @never_compiled
    def is_shared_with_cpp(self) -> bool:
        """Whether C++ code holds on to the wrapper (autograd, for a custom Function's input)."""
        with torch._C.DisableTorchFunctionSubclass():
            return self._use_count() > 1

    @never_compiled
    def is_own(self) -> bool:
        """Whether the wrapper's place in the autograd graph is that of ``plain``.

        A custom autograd Function that returns the wrapper, or modifies it (``mark_dirty``), gives
        it another, or none.
        """
        with torch._C.DisableTorchFunctionSubclass():
            history = self.grad_fn
        if not self._plain.requires_grad:
            return history is None
        return isinstance(history, _Identity._backward_cls)

    def _with_history(self, value: Tensor) -> Tensor:
        """The value as a tensor whose place in the autograd graph is the wrapper's."""
        if self.is_own():
            return value
        with torch._C.DisableTorchFunctionSubclass(), torch.enable_grad():
            return _Adopted.apply(self, [value])

    @classmethod
    @never_compiled
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # The first is true where Dynamo inlines this into a graph, as a constant.
        inlined = torch.compiler.is_dynamo_compiling()
        if inlined or func in _METADATA or TracingContext.try_get() is not None:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs or {})
        if func in _AUTOGRAD and args[0].is_own() and isinstance(args[0]._formula, Formula):
            # Who hooks the logits, or the node that makes them, wants their gradient.
            args[0]._formula.seen |= _AUTOGRAD[func]
            return func(args[0]._plain, *args[1:], **kwargs or {})
        if func in _GRAD and args[0]._plain.retains_grad:
            return args[0]._plain.grad
        with _LOCK:
            result = on_use(func, args, kwargs or {})
        if result is not NotImplemented:
            return result
        for written in _written(func, args, kwargs or {}):
            written._become(written=True)
        args, kwargs = pytree.tree_map_only(
            DeferredTensor, lambda t: t._become(written=False), (args, kwargs or {})
        )
        return func(*args, **kwargs)

    @classmethod
    @never_compiled
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        _refuse_writes(func, args, kwargs)
        with torch.overrides.enable_reentrant_dispatch():  # the formula's own graph is recorded
            values, named = pytree.tree_map_only(DeferredTensor, lambda t: t._value, (args, kwargs))
        out = func(*values, **named)
        if _is_view(func) and isinstance(args[0], DeferredTensor) and args[0]._formula is None:
            # A compiler must know what aliases its input.
            out = pytree.tree_map_only(Tensor, lambda t: _wrap(t, None, t.stride()), out)
            return return_and_correct_aliasing(func, args, kwargs, out)
        return out

    @never_compiled
    def __repr__(self, *, tensor_contents: Any = None) -> str:
        if TracingContext.try_get() is not None:
            return f"DeferredTensor({self._plain!r})"
        return repr(self._become(written=False))

    # ---- what torch.compile needs to look inside

    @property
    @never_compiled
    def _value(self) -> Tensor:
        with _LOCK:
            if self._formula is not None:
                if self._formula.is_view and self._formula.is_edited():
                    raise RuntimeError(_EDITED_VIEW)
                self._formula.fill(self._plain)
            return self._plain

    @property
    @never_compiled
    def _outline(self) -> Tensor:
        """A tensor of one element, expanded: what guards may look at."""
        if not hasattr(self, "_expanded"):
            one = self._plain.new_empty(())
            self._expanded = one.expand(self.shape).requires_grad_(self.requires_grad)
        return self._expanded

    @never_compiled
    def __tensor_flatten__(self) -> tuple[list[str], bool]:
        # A view is compiled as such (``entering.py``): code for another tensor does not fit it.
        is_view = self._formula is not None and self._formula.is_view
        return ["_outline" if _reads_metadata(sys._getframe(1)) else "_value"], is_view

    @staticmethod
    @never_compiled
    def __tensor_unflatten__(
        inner: dict[str, Tensor], context: bool, size: Sequence[int], stride: Sequence[int]
    ) -> Tensor:
        if "_outline" in inner:
            outline = inner["_outline"]
            value = outline.new_empty_strided(size, stride).requires_grad_(outline.requires_grad)
            return _wrap(value, None, stride)
        value = inner["_value"]
        return value.detach() if type(value) is Tensor else _wrap(value, None, stride)

    def _stable_hash_for_caching(self) -> str:
        return repr((self.shape, self.stride(), self.dtype, self.device, self.requires_grad))


def _wrap(plain: Tensor, formula: Formula | None, strides: Sequence[int]) -> DeferredTensor:
    wrapper = Tensor._make_wrapper_subclass(
        DeferredTensor,
        plain.shape,
        strides=strides,
        dtype=plain.dtype,
        device=plain.device,
        requires_grad=formula is None and plain.requires_grad,
    )
    torch._C._set_throw_on_mutable_data_ptr(wrapper)
    wrapper._plain, wrapper._formula = plain, formula
    return wrapper


def _written(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> list[DeferredTensor]:
    """Deferred tensors that a function modifies in place, by PyTorch's conventions for its name."""
    name = getattr(func, "__name__", "")
    ends_in_one = name.endswith("_") and not name.endswith("__") and name != "requires_grad_"
    in_place = ends_in_one or name == "__setitem__" or kwargs.get("inplace")
    found = args[:1] if in_place else ()
    leaves = pytree.tree_leaves((found, kwargs.get("out")))
    return [leaf for leaf in leaves if type(leaf) is DeferredTensor]


def _refuse_writes(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
    """Raises where an op would modify a wrapper: autograd would not see that ``plain`` changed.

    A compiler's copy may be where a graph break is an error: this backend gives the compiled
    function the logits' values (``entering.py``).

    Raises:
        NotImplementedError: for a compiler's copy; Dynamo then leaves the op to eager PyTorch.
        RuntimeError: for a real one.
    """
    arguments = enumerate(func._schema.arguments)
    written = [args[i] if i < len(args) else kwargs.get(a.name) for i, a in arguments if a.is_write]
    for tensor in pytree.tree_leaves(written):
        if isinstance(tensor, DeferredTensor):
            is_copy = tensor._formula is None
            if not (is_copy and _must_be_compiled()):
                error = NotImplementedError if is_copy else RuntimeError
                raise error(_MODIFIED.format(func))


def _must_be_compiled() -> bool:
    """Whether Dynamo traces with ``fullgraph=True``, or as if, for a compiler that can do it.

    Plain Inductor cannot: AOTAutograd raises for writes to a tensor subclass (torch 2.13).
    """
    translator = getattr(torch._dynamo.symbolic_convert.tls, "current_tx", None)
    breaks = (getattr(translator, name, False) for name in ("one_graph", "error_on_graph_break"))
    if not any(breaks):
        return False
    compiler = getattr(getattr(translator, "output", None), "compiler_fn", None)
    compiler = getattr(compiler, "_torchdynamo_orig_backend", compiler)
    return not isinstance(compiler, torch._TorchCompileInductorWrapper)


def _is_view(func: Any) -> bool:
    return any(out.alias_info is not None for out in func._schema.returns)


class Formula:
    """How a value is computed, and its gradients.

    It is part of the autograd graph (through :class:`_Deferred`) and therefore must not refer to
    the value's tensor, or both would never be freed.

    Attributes:
        tensors: Aliases of the inputs that are tensors. Hooks on the inputs must not run once
            for the value's own graph and once more for the whole.
        recorded: The value's own graph, until a backward pass has used it up.
        root: Itself.
        shape, dtype, device: Of the value; of the device its type.
        symbolic: Of each input, as in :func:`defer`.
        compiler: Compiles functions of the value, or None.
        claims: As in :func:`defer`.
        is_view: No.
        seen: Whether the value has been looked at: its gradient may be asked for.
        kept: The value, computed before an input changed (``kept.py``); or None.
    """

    is_view = False

    def __init__(
        self,
        graph: fx.GraphModule,
        inputs: Sequence[Any],
        requires_grad: bool,
        shape: Sequence[int],
        val: Tensor,
        symbolic: Sequence[tuple[int, ...] | None],
        compiler: Any,
        claims: bool = False,
    ) -> None:
        self.graph = graph
        self.claims = claims
        self.shape, self.dtype, self.device = tuple(shape), val.dtype, val.device.type
        self.symbolic = symbolic
        self.compiler = compiler
        self.seen = False
        with torch.set_grad_enabled(requires_grad):
            self.inputs = [t.view_as(t) if isinstance(t, Tensor) else t for t in inputs]
        self.requires_grad = requires_grad
        self.inference = torch.is_inference_mode_enabled()
        self.states = [_state_of(t) for t in self.tensors]
        self.filled = False
        self.kept: Tensor | None = None
        self.recorded: GradientEdge | None = None

    @property
    def root(self) -> Formula:
        return self

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def features(self) -> int:
        return self.shape[-1]

    @property
    def is_dynamic(self) -> bool:
        """Whether the logits' graph was compiled for more than one size."""
        return any(dims is None or dims for dims in self.symbolic)

    @property
    def tensors(self) -> list[Tensor]:
        return [t for t in self.inputs if isinstance(t, Tensor)]

    def saved(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        """Those that must not be modified until the backward pass."""
        return tensors

    def fill(self, plain: Tensor) -> None:
        """Gives ``plain`` its value, once.

        Raises:
            StaleError: if an input was modified in place since.
        """
        if self.filled:
            return
        if torch._C._is_tracing():
            raise RuntimeError(
                "autochunk: torch.jit.trace would record how deferred logits are computed; call "
                ".materialize() on them first"
            )
        self._check()
        with self.ambient():
            value = self.graph.forward(*self.inputs) if self.kept is None else self.kept
            self.recorded = get_gradient_edge(value) if value.requires_grad else None
            plain.data = value.detach()
        self.filled = True

    def ordinary(self, plain: Tensor, written: bool) -> Tensor:
        """The tensor that the wrapper becomes; ``written``: whether it is modified next."""
        self.fill(plain)
        return claimed(plain) if self.claims else plain

    def compute(self) -> Tensor:
        """The value without its history."""
        if self.kept is not None:
            return self.kept
        self._check()
        with self.ambient(), torch.no_grad():
            return self.graph.forward(*self.inputs)

    original = compute

    def is_fresh(self) -> bool:
        """Whether no input was modified in place since."""
        return not self._stale()

    def _stale(self) -> list[int]:
        """Positions of the inputs that were modified in place since, if it is needed."""
        if self.kept is not None:
            return []
        pairs = enumerate(zip(self.tensors, self.states, strict=True))
        return [i for i, (tensor, state) in pairs if _state_of(tensor) != state]

    def _check(self) -> None:
        for position in self._stale():
            tensor = self.tensors[position]
            raise StaleError(
                f"autochunk: the logits were deferred, and their input {position} (shape "
                f"{list(tensor.shape)}) has since been modified in place (by an optimizer's "
                "step?), so their value can no longer be computed; use the logits before "
                "that, or call .materialize() on them"
            )

    @contextlib.contextmanager
    def ambient(self) -> Iterator[None]:
        """The modes in which the model would have computed the value, whatever they are now."""
        with (
            torch.inference_mode(self.inference),
            torch.set_grad_enabled(self.requires_grad),
            torch._C._DisableAutocast(),
            no_saved_tensors_hooks(),
            _disable_current_modes(),
            temporarily_clear_interpreter_stack(),
        ):
            yield

    def gradients(self, upstream: Tensor, wanted: Sequence[bool]) -> list[Tensor | None]:
        """Gradients with respect to the ``wanted`` ones of ``tensors``.

        The value is computed again if it was used up (``retain_graph``), or was never recorded.
        """
        with _LOCK:
            recorded, self.recorded = self.recorded, None
        if recorded is None:
            with self.ambient():
                recorded = get_gradient_edge(self.graph.forward(*self.inputs))
        create_graph = torch.is_grad_enabled()
        return wanted_gradients(
            [recorded], [upstream], self.tensors, wanted, create_graph=create_graph
        )


def wanted_gradients(
    outputs: Sequence[Tensor | GradientEdge],
    upstream: Sequence[Any],
    tensors: Sequence[Tensor],
    wanted: Sequence[bool],
    **settings: Any,
) -> list[Tensor | None]:
    """:func:`torch.autograd.grad`, with None for tensors that are not ``wanted``."""
    inputs = [t for t, want in zip(tensors, wanted, strict=True) if want]
    found = iter(torch.autograd.grad(outputs, inputs, upstream, allow_unused=True, **settings))
    return [next(found) if want else None for want in wanted]


def no_saved_tensors_hooks() -> contextlib.AbstractContextManager[Any]:
    """A checkpoint around us, for one, must not count what a formula saves."""
    if not torch._C._autograd._saved_tensors_hooks_is_enabled():
        return contextlib.nullcontext()
    return saved_tensors_hooks(lambda t: t, lambda t: t)


def _state_of(tensor: Tensor) -> tuple[int, int]:
    """Changes when the tensor is modified in place, or its memory is taken away."""
    version = 0 if tensor.is_inference() else tensor._version
    return version, tensor.untyped_storage().nbytes()


class _Deferred(torch.autograd.Function):
    """``plain``, yet to be filled, as a function of the formula's tensors."""

    @staticmethod
    @never_compiled
    def forward(ctx: Any, formula: Formula, shape: Any, val: Any, *tensors: Tensor) -> Tensor:
        ctx.formula = formula
        ctx.save_for_backward(*formula.saved(tensors))
        ctx.set_materialize_grads(False)
        return torch.empty_strided(shape, [0] * len(shape), dtype=val.dtype, device=val.device)

    @staticmethod
    @torch.compiler.disable
    def backward(ctx: Any, grad: Tensor | None) -> Any:
        wanted = ctx.needs_input_grad[3:]
        if grad is None or (in_compiled_autograd() and not grad.any()):
            return None, None, None, *no_gradients(ctx.formula.tensors, wanted)  # another way
        _ = ctx.saved_tensors  # raises what eager PyTorch raises if one was modified or freed
        return None, None, None, *ctx.formula.gradients(grad, wanted)


def in_compiled_autograd() -> bool:
    """Whether this is a backward pass that Dynamo has compiled (``config.compiled_autograd``)."""
    return compiled_autograd.in_compiled_autograd_region


def no_gradients(tensors: Sequence[Tensor], wanted: Sequence[bool]) -> list[Tensor | None]:
    """What a backward function returns whose gradient goes another way.

    None for each; but compiled autograd adds up whatever it gets, and is given zeros.
    """
    if not in_compiled_autograd():
        return [None] * len(tensors)
    return [
        torch.zeros((), dtype=t.dtype, device=t.device).expand(t.shape) if want else None
        for t, want in zip(tensors, wanted, strict=True)
    ]


class _Identity(torch.autograd.Function):
    """The wrapper as a function of ``plain``."""

    @staticmethod
    @never_compiled
    def forward(ctx: Any, plain: Tensor, formula: Formula, strides: Any) -> Tensor:
        return _wrap(plain, formula, strides)

    @staticmethod
    @never_compiled
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad, None, None


class _Adopted(torch.autograd.Function):
    """The value of a wrapper whose history autograd has replaced, as a function of the wrapper."""

    @staticmethod
    @never_compiled
    def forward(ctx: Any, wrapper: DeferredTensor, value: list[Tensor]) -> Tensor:
        return alias(*value)

    @staticmethod
    @never_compiled
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad, None


def has_other_history(tensor: Tensor) -> bool:
    """Whether autograd has replaced the history of a tensor that is, or was, a wrapper."""
    if type(tensor) is DeferredTensor:
        return not tensor.is_own()
    return isinstance(tensor.grad_fn, _Adopted._backward_cls)


def alias(value: Tensor) -> Tensor:
    """The same memory as a tensor that autograd takes for a new one."""
    return torch.empty(0, dtype=value.dtype, device=value.device).set_(value.detach())


_LOCK = threading.RLock()

#: Dynamo's guards and the conversion to fake tensors look at the metadata of an inner tensor only.
_METADATA_READERS = tuple(
    f"torch.{package}." for package in ("_dynamo", "_guards", "_subclasses", "fx.experimental")
)


def _reads_metadata(reader: FrameType) -> bool:
    if reader.f_code.co_filename == "<string>" and reader.f_back is not None:  # a guard's eval()
        reader = reader.f_back
    return f"{reader.f_globals.get('__name__')}.".startswith(_METADATA_READERS)


_MODIFIED = (
    "autochunk: {} would modify deferred logits in place before they are computed; call "
    ".materialize() on them first"
)


_EDITED_VIEW = (
    "autochunk: a view of deferred logits, which a loss was computed from, is given to C++ or to a "
    "function that another backend has compiled, and the logits have since been modified in place; "
    "call .materialize() on the view first"
)


def _functions(attributes: str, methods: str) -> frozenset[Any]:
    """What ``__torch_function__`` is told when these names of a tensor are used."""
    return frozenset(
        [getattr(Tensor, name).__get__ for name in attributes.split()]
        + [getattr(Tensor, name) for name in methods.split()]
    )


#: Answered by the wrapper itself.
_METADATA = _functions(
    attributes="_version shape dtype device ndim layout requires_grad is_leaf itemsize nbytes "
    "is_cpu is_cuda is_xpu is_mps is_meta is_sparse is_quantized is_nested",
    methods="size dim ndimension numel nelement element_size stride storage_offset get_device "
    "is_contiguous is_floating_point is_complex is_signed is_inference __len__",
) | {
    torch.numel,
    torch.is_floating_point,
    torch.is_complex,
    torch.is_tensor,
    Tensor._backward_hooks.__set__,  # by autograd itself, for what a Function has modified
}

#: Answered by ``plain`` where it has been told to keep its gradient.
_GRAD = _functions(attributes="grad", methods="")

#: Answered by ``plain`` before it has a value, and whether the gradient may be asked for after
#: that: FSDP, for one, hooks every output of a model.
_AUTOGRAD = {
    **dict.fromkeys(_functions(attributes="output_nr retains_grad", methods=""), False),
    **dict.fromkeys(_functions(attributes="grad_fn", methods="register_hook"), True),
}
