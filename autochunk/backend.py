"""Backend: the stages in order, and the fallback to plain Inductor."""

from __future__ import annotations

import functools
import hashlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import fx
from torch._dynamo.exc import RestartAnalysis, SkipFrame
from torch._inductor.compile_fx import compile_fx

from autochunk import body as body_stage
from autochunk import (
    copies,  # noqa: F401
    recording,  # noqa: F401
    runtime,
)
from autochunk.aliases import rejoined, separate
from autochunk.autotune import autotune
from autochunk.body import BodySpec, TensorSpec
from autochunk.bounds import index_checking
from autochunk.config import OptionError, Options
from autochunk.deferred import defer, no_saved_tensors_hooks
from autochunk.donation import donation_aware, undonated
from autochunk.embedding import embedding_gradients
from autochunk.entering import enter
from autochunk.evaluation import Programs
from autochunk.find import AMPLIFY, find, hint, is_marked_dynamic, op_name, source_line
from autochunk.grouping import grouped, kept_more_than_once
from autochunk.interpret import is_little_around, is_small
from autochunk.isolation import Failure, isolate
from autochunk.lower import lower, refuse_to_lower, remaining_write
from autochunk.memory import Memory
from autochunk.merging import lift_unmerged
from autochunk.modes import claimed
from autochunk.order import check_order, refuse_deferral
from autochunk.plan import plan, sizes_to_try
from autochunk.products import other_products
from autochunk.report import Report, Row, logger, next_graph, publish, write_debug
from autochunk.rewrite import Rewritten, Scheduled, rewrite
from autochunk.tail import cotangents, differentiable_outputs
from autochunk.twin import with_twin
from autochunk.types import (
    Candidate,
    Cotangents,
    Lifted,
    Lowered,
    Plan,
    Refusal,
    RefusedError,
    Region,
)
from autochunk.version import __version__
from autochunk.walk import row_input_features
from autochunk.weights import refuse_weights

_T = TypeVar("_T")

#: How a backend tells Dynamo to trace again or to skip the frame; state of Dynamo's goes with it.
CONTROL_FLOW = (RestartAnalysis, SkipFrame)


class FallbackWarning(UserWarning):
    """A rewrite failed; the graph, or the head that it was about, runs as plain Inductor."""


def autochunk(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
    required: bool = False,
    **extra: Any,
) -> Callable[..., Any]:
    """The compiler function behind ``torch.compile(..., backend="autochunk")``.

    Args:
        gm: Dynamo's graph.
        example_inputs: Its inputs.
        mode: Inductor's mode.
        options: See :class:`autochunk.Options`.
        required: A linear counts as a head whatever its ratio of features, and if none can be
            chunked that is an error.

    Raises:
        OptionError: for options that are not valid.
        RefusedError: where a rewrite is ``required`` and not possible.
        Exception: what failed in a rewrite, with ``strict``.
    """
    parsed = Options.parse(options, mode)
    entered = _guarded(lambda: enter(gm, functools.partial(_compile, options=parsed)))
    if isinstance(entered, Failure):
        if parsed.strict:
            raise entered.error
        _warn(f"logits that enter a compiled function are computed ({entered.reason})")
    elif entered is not None:
        return entered
    amplify = 0 if required else AMPLIFY
    return _compile(gm, example_inputs, options=parsed, required=required, amplify=amplify)


def _compile(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Options,
    required: bool,
    amplify: float = AMPLIFY,
) -> Callable[..., Any]:
    graph = next_graph()
    separated = None if required else _guarded(lambda: separate(gm))
    aliases = None if isinstance(separated, Failure) else separated
    made, failing = _make(aliases.gm if aliases else gm, options, graph, required, amplify)
    if isinstance(separated, Failure):
        made = separated
    compiled: Callable[..., Any] | Failure | None = None
    if isinstance(made, Failure):
        failure: Failure | None = made
    else:
        if required:
            _raise_refusal(made.report)
        with undonated(required):
            compiled = _guarded(
                functools.partial(_compile_rewritten, made, example_inputs, options)
            )
        failure = compiled if isinstance(compiled, Failure) else None
        report = made.report
        if callable(compiled) and aliases is not None:
            compiled = rejoined(compiled, aliases)
    if failure is not None:
        report = Report(graph, (), failure=failure.text)
    if compiled is None or isinstance(compiled, Failure):
        # Not guarded: what plain Inductor raises, too, is no failure of a rewrite.
        with undonated(required):
            compiled = _inductor(gm, example_inputs, options)
    if failure is not None and options.strict:
        raise failure.error
    if failure is not None:
        _warn(f"the graph runs as plain Inductor ({failure.reason})")
    elif failing:
        found = "; ".join(f"{r.source or name}: {r.detail}" for name, r in failing.items())
        _warn(f"{len(failing)} of its heads are left to plain Inductor ({found})")
    publish(report, options.debug is not None)
    return compiled


def _make(
    gm: fx.GraphModule, options: Options, graph: int, required: bool, amplify: float
) -> tuple[_Made | Failure, Mapping[str, Refusal]]:
    """The rewritten graph, and the heads that are left alone because their rewrite failed."""

    def attempt(without: Mapping[str, Refusal]) -> _Made | Failure:
        # Anomaly detection looks for nan in each gradient, which a traced one cannot answer; a
        # checkpoint around the compiled function must not count what tracing saves.
        with torch.autograd.set_detect_anomaly(False), no_saved_tensors_hooks():
            return _guarded(lambda: _rewrite(gm, options, graph, required, amplify, without))

    made = attempt({})
    if isinstance(made, Failure) and not options.strict:
        heads = _guarded(lambda: find(gm, options.min_bytes, amplify)[0])
        if not isinstance(heads, Failure) and len(heads) > 1:
            logger.info("a rewrite failed; its heads are tried one by one: %s", made.text)
            isolated, failing = isolate(heads, attempt)
            if isolated is not None and isolated.rewritten is not None:
                return isolated, failing
    return made, {}


def _guarded(work: Callable[[], _T]) -> _T | Failure:
    """What ``work`` returns, or what it raised and nobody expected."""
    try:
        return work()
    except (OptionError, RefusedError, *CONTROL_FLOW):
        raise
    except Exception as error:
        return Failure(error)


def _warn(what: str) -> None:
    warnings.warn(
        f"autochunk: a rewrite failed and {what}. "
        'Please report it; options={"strict": True} shows where it comes from.',
        FallbackWarning,
        stacklevel=3,
    )


@dataclass(frozen=True)
class _Made:
    """What ``_rewrite`` decided.

    Attributes:
        rewritten: The new graph; None if no head is chunked.
        interpreted: Whether what is around its regions runs op by op.
    """

    rewritten: Rewritten | None
    report: Report
    interpreted: bool = False


def _compile_rewritten(
    made: _Made, example_inputs: Sequence[Any], options: Options
) -> Callable[..., Any] | None:
    rewritten = made.rewritten
    if rewritten is None:
        return None
    if made.interpreted:
        compiled: Callable[..., Any] = rewritten.gm.forward
    else:
        compiled = _inductor_with_regions(rewritten.gm, example_inputs, options)
    again = functools.partial(
        _compile, options=replace(options, min_bytes=0), required=True, amplify=1
    )
    return _Compiled(compiled, rewritten, Programs(again))


def _inductor(
    gm: fx.GraphModule, example_inputs: Sequence[Any], options: Options
) -> Callable[..., Any]:
    patches = index_checking(donation_aware(options.inductor))
    return compile_fx(gm, list(example_inputs), config_patches=patches)


def _inductor_with_regions(
    gm: fx.GraphModule, example_inputs: Sequence[Any], options: Options
) -> Callable[..., Any]:
    patches = embedding_gradients(index_checking(donation_aware(options.inductor)))
    return compile_fx(gm, list(example_inputs), config_patches=patches)


def _raise_refusal(report: Report) -> None:
    reasons = [row.refusal for row in report.rows]
    if reasons and None not in reasons:
        worst = next((r for r in reasons if r and r.code not in ("small", "single-row")), None)
        if worst is not None:
            raise RefusedError(worst)


@dataclass(frozen=True)
class _Analysis:
    """What became of each head of a graph.

    Attributes:
        gm: The graph that was analysed: Dynamo's, or one with twins (``twin.py``).
        memory: Of that graph.
        every: All candidates.
        refusals: Those that are left alone.
        lowered, lifted, scheduled: Of the others; None and empty if there are none.
        twins: Heads whose columns have a product of their own.
    """

    gm: fx.GraphModule
    memory: Memory
    every: tuple[Candidate, ...]
    refusals: Mapping[str, Refusal]
    lowered: Lowered | None
    lifted: Lifted | None
    scheduled: Sequence[Scheduled]
    twins: frozenset[str] = frozenset()


def _analyse(
    gm: fx.GraphModule,
    options: Options,
    required: bool,
    amplify: float,
    without: Mapping[str, Refusal],
) -> _Analysis:
    candidates, refused = find(gm, options.min_bytes, amplify)
    if not required:
        refused = (*refused, *other_products(gm, options.min_bytes))
    refusals: dict[str, Refusal] = {c.name: r for c, r in refused} | dict(without)
    every = (*candidates, *(c for c, _ in refused))
    memory = Memory.of(gm.graph)
    refusals.update(refuse_weights(gm.graph, memory, candidates))
    for candidate in candidates:
        if candidate.name in refusals:
            continue
        refusal = refuse_to_lower(gm.graph, memory, candidate)
        if refusal is not None:
            refusals[candidate.name] = refusal
    # Each round lowers the heads that are still in; a refusal starts another without that head.
    while kept := [c for c in candidates if c.name not in refusals]:
        lowered = lower(gm.graph, memory, kept)
        remaining = remaining_write(lowered)
        if remaining is not None:
            refusals.update(dict.fromkeys((c.name for c in kept), remaining))
            break
        lowered, lifted = lift_unmerged(lowered, defer=not required)
        found = {**lifted.refusals, **refuse_deferral(gm.graph, memory, lowered, lifted)}
        if not found:
            scheduled, found = _schedule(lowered, lifted, options, required)
        if not found:
            return _Analysis(gm, memory, every, refusals, lowered, lifted, scheduled)
        refusals.update(found)
    return _Analysis(gm, memory, every, refusals, None, None, ())


def _with_twins(
    analysis: _Analysis,
    options: Options,
    required: bool,
    amplify: float,
    without: Mapping[str, Refusal],
) -> _Analysis:
    """The analysis with twins of the heads that mix rows, where that is better."""
    for name, refusal in analysis.refusals.items():
        gm = with_twin(analysis.gm, name) if refusal.code == "mixes-rows" else None
        if gm is not None:
            again = _analyse(gm, options, required, amplify, without)
            if len(again.refusals) < len(analysis.refusals):
                again = replace(again, twins=analysis.twins | {name})
                return _with_twins(again, options, required, amplify, without)
    return analysis


def _rewrite(
    gm: fx.GraphModule,
    options: Options,
    number: int,
    required: bool,
    amplify: float,
    without: Mapping[str, Refusal],
) -> _Made:
    analysis = _analyse(gm, options, required, amplify, without)
    analysis = _with_twins(analysis, options, required, amplify, without)
    lowered, lifted, scheduled = analysis.lowered, analysis.lifted, analysis.scheduled
    rewritten: Rewritten | None = None
    stages: list[tuple[str, str]] = [("dynamo", _readable(gm))]
    if lowered is not None and lifted is not None:
        if options.autotune:
            scheduled = [_tuned(item, options) for item in scheduled]
            analysis = replace(analysis, scheduled=scheduled)
        loops = [_loop(item, options) for item in scheduled]
        groups = grouped(lowered, scheduled, options)
        rewritten = rewrite(analysis.gm, analysis.memory, lowered, lifted, groups)
        check_order(analysis.gm.graph, analysis.memory, lowered)
        if analysis.gm is not gm:
            stages.append(("twins", _readable(analysis.gm)))
        stages.append(("lowered", _readable(lowered.graph)))
        for item, loop in zip(scheduled, loops, strict=True):
            stages.append((f"{item.region.name}_body", _readable(item.region.body)))
            if item.cotangents is not None:
                stages.append((f"{item.region.name}_cotangents", _readable(item.cotangents.graph)))
            for name in ("value_kernel", "full_kernel", "grad_kernel"):
                kernel = getattr(loop, name)
                if kernel is not None:
                    stages.append((f"{item.region.name}_{name}", kernel.graph))
        stages.append(("rewritten", _readable(rewritten.gm)))
    directory = ""
    if options.debug is not None and analysis.every:
        directory = write_debug(options.debug, number, stages)
    rows = [_row(candidate, analysis) for candidate in analysis.every]
    interpreted = (
        (required and not torch.is_grad_enabled())
        and lowered is not None
        and lifted is not None
        and is_little_around(analysis.gm, lowered, lifted)
    )
    report = Report(number, tuple(rows), directory=directory)
    return _Made(rewritten, report, interpreted)


def _schedule(
    lowered: Lowered, lifted: Lifted, options: Options, required: bool
) -> tuple[list[Scheduled], dict[str, Refusal]]:
    scheduled = []
    for region in lifted.regions:
        refusal = _refuse_dynamic_features(lowered, region)
        if refusal is not None:
            return [], dict.fromkeys(region.heads, refusal)
        wanted = bool(region.grad_outputs and differentiable_outputs(lowered, lifted, region))
        known = cotangents(lowered, lifted, region) if wanted else "no gradient is wanted"
        decided = plan(region, known, options, wanted)
        if required and not options.autotune and is_small(region, decided):
            decided = replace(decided, interpreted=True)
        if wanted and options.strategy == "fused" and decided.strategy != "fused":
            head = _first_head(lowered, region)
            refusal = Refusal("not-fusable", op_name(head), decided.why, source_line(head))
            return [], dict.fromkeys(region.heads, refusal)
        scheduled.append(_scheduled(region, decided, known, options))
    several = kept_more_than_once(scheduled) if options.strategy == "auto" else frozenset()
    for i, item in enumerate(scheduled):
        if item.region.name in several:
            why = "several losses of this weight; each would keep a gradient of the weight's size"
            decided = plan(item.region, why, options, wanted=True)
            scheduled[i] = _scheduled(item.region, decided, why, options)
    return scheduled, {}


def _first_head(lowered: Lowered, region: Region) -> fx.Node:
    return next(node for node, c in lowered.heads.items() if c.name in region.heads)


def _refuse_dynamic_features(lowered: Lowered, region: Region) -> Refusal | None:
    """A region that has a feature dimension which the user has marked as dynamic."""
    inputs = [(spec.source, row_input_features(spec)) for spec in region.row_inputs]
    inputs += [(node, list(node.meta["val"].shape)) for node in region.shared_inputs]
    for node, features in inputs:
        if any(map(is_marked_dynamic, features)):
            shape = list(node.meta["val"].shape)
            detail = f"a feature of an input of shape {shape} is marked as dynamic (mark_dynamic)"
            head = _first_head(lowered, region)
            return Refusal("dynamic-features", op_name(head), detail, source_line(head))
    return None


def _scheduled(
    region: Region, decided: Plan, known: Cotangents | str, options: Options
) -> Scheduled:
    used = known if decided.strategy == "fused" and isinstance(known, Cotangents) else None
    return Scheduled(region, decided, used, _key(_spec(region, decided, options), decided, region))


def _spec(region: Region, decided: Plan, options: Options) -> BodySpec:
    # int() specialises a symbolic size: everything but the rows is static in a kernel.
    rows = []
    for spec in region.row_inputs:
        val = spec.source.meta["val"]
        sizes = tuple(int(f) for f in row_input_features(spec))
        rows.append(TensorSpec(sizes, (), spec.dtype, val.device))
    shared = []
    for node in region.shared_inputs:
        val = node.meta["val"]
        sizes, strides = tuple(map(int, val.shape)), tuple(map(int, val.stride()))
        shared.append(TensorSpec(sizes, strides, val.dtype, val.device))
    outputs = tuple(
        TensorSpec(tuple(int(f) for f in o.features), (), o.val.dtype, o.val.device)
        for o in region.outputs
    )
    grads = decided.strategy != "forward"
    return BodySpec(
        body=region.body,
        rows=tuple(rows),
        shared=tuple(shared),
        outputs=outputs,
        row_grads=region.row_grads if grads else (),
        shared_grads=region.shared_grads if grads else (),
        grad_outputs=region.grad_outputs if grads else (),
        chunk_rows=decided.chunk_rows,
        symbolic=decided.dynamic,
        checked=region.all_checked,
        inductor=options.inductor,
    )


def _key(spec: BodySpec, decided: Plan, region: Region) -> str:
    """A hash of everything that decides what a region computes."""
    parts = [
        spec.body.code,
        spec.rows,
        spec.shared,
        spec.outputs,
        spec.row_grads,
        spec.shared_grads,
        spec.grad_outputs,
        spec.chunk_rows,
        spec.symbolic,
        spec.checked,
        sorted((k, repr(v)) for k, v in spec.inductor.items()),
        decided.strategy,
        decided.accumulate_dtype,
        decided.interpreted,
        [
            (c.graph.code, c.row_inputs, c.shared_inputs, c.size, c.wraps, c.source)
            for c in region.checks
        ],
        torch.__version__,
        __version__,
    ]
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


def _tuned(item: Scheduled, options: Options) -> Scheduled:
    """The same with the chunk size that is best on this machine."""
    region = item.region

    def with_plan(decided: Plan) -> Scheduled:
        return replace(
            item, plan=decided, key=_key(_spec(region, decided, options), decided, region)
        )

    built: dict[int, runtime.Loop] = {}

    def build(decided: Plan) -> runtime.Loop:
        built[decided.chunk_rows] = _build(with_plan(decided), options)
        return built[decided.chunk_rows]

    plans = sizes_to_try(item.plan, region, options)
    device = region.shared_inputs[0].meta["val"].device
    best = with_plan(autotune(plans, item.key, device, build))
    if best.plan.chunk_rows in built:
        runtime.REGIONS.setdefault(best.key, built[best.plan.chunk_rows])
    return best


def _loop(item: Scheduled, options: Options) -> runtime.Loop:
    """The region's loop; an equal one that exists already is used again."""
    if item.key not in runtime.REGIONS:
        runtime.REGIONS[item.key] = _build(item, options)
    return runtime.REGIONS[item.key]


def _build(item: Scheduled, options: Options) -> runtime.Loop:
    spec = _spec(item.region, item.plan, options)
    strategy = item.plan.strategy
    kernels = {}
    if item.plan.interpreted:
        kernels["value_kernel"] = body_stage.interpreted(spec)
    elif strategy == "fused":
        kernels["full_kernel"] = body_stage.compile_body(spec, values=True, grads=True)
    else:
        kernels["value_kernel"] = body_stage.compile_body(spec, values=True, grads=False)
        if strategy == "recompute":
            kernels["grad_kernel"] = body_stage.compile_body(spec, values=False, grads=True)
    return runtime.Loop(
        spec=spec,
        checks=item.region.checks,
        accumulate=item.plan.accumulate_dtype,
        **kernels,
    )


@dataclass(frozen=True)
class _Compiled:
    """The compiled graph; puts deferred tensors where the old graph returned wide values."""

    compiled: Callable[..., Any]
    rewritten: Rewritten
    programs: Programs

    def __call__(self, *args: Any) -> Any:
        # AOTAutograd views its inputs anew; under no_grad those would have no history.
        recorded = any(deferral.needs_grad for deferral in self.rewritten.deferrals)
        with torch.set_grad_enabled(recorded or torch.is_grad_enabled()):
            results = self.compiled(*args)
        if not self.rewritten.deferrals and not self.rewritten.claims:
            return results
        outputs: list[Any] = [None] * self.rewritten.n_outputs
        for position, value in zip(self.rewritten.kept, results, strict=False):
            outputs[position] = claimed(value) if position in self.rewritten.claims else value

        def take(source: int | tuple[str, int]) -> Any:
            if isinstance(source, int):
                return source
            kind, i = source
            return args[i] if kind == "input" else results[i]

        for deferral in self.rewritten.deferrals:
            tensor = defer(
                deferral.graph,
                inputs=[take(source) for source in deferral.inputs],
                shape=[take(size) for size in deferral.shape],
                strides=[take(stride) for stride in deferral.strides],
                val=deferral.val,
                requires_grad=deferral.needs_grad,
                claims=deferral.claims,
                symbolic=deferral.symbolic,
                compiler=self.programs,
            )
            for position in deferral.positions:
                outputs[position] = tensor
        return outputs


def _row(candidate: Candidate, analysis: _Analysis) -> Row:
    refusal = analysis.refusals.get(candidate.name)
    lowered, lifted, scheduled = analysis.lowered, analysis.lifted, analysis.scheduled
    val = candidate.node.meta["example_value"]
    dtype = str(val.dtype).removeprefix("torch.")
    by_row = val.shape[:-1] if hint(val.shape[-1]) == candidate.out_features else [candidate.rows]
    rows = "×".join(str(s) for s in by_row)
    row = Row(
        head=candidate.name,
        source=candidate.source,
        shape=f"{rows} × {candidate.out_features} {dtype}",
        found=_path(candidate),
        logits_bytes=candidate.logits_bytes,
        refusal=refusal,
    )
    if refusal is not None or lowered is None or lifted is None:
        return row
    mine = [item for item in scheduled if candidate.name in item.region.heads]
    notes = []
    if len(mine) > 1:
        notes.append(f"its rows are selected in {len(mine)} ways; the product runs once for each")
    if candidate.name in analysis.twins:
        notes.append("its columns are reduced, too; the product runs once more for them")
    if any(_deferred_from(node, candidate, lowered) for node in lifted.deferred):
        also = "also" if mine else "only"
        notes.append(f"the logits are {also} returned: deferred until somebody uses them")
    notes.extend(
        f"recomputed in the backward pass: {item.plan.why}"
        for item in mine
        if item.plan.strategy == "recompute"
    )
    plans = [item.plan for item in mine]
    if plans and all(p.num_chunks == 1 for p in plans):
        notes.append("all rows are one chunk: its logits exist, once, and become their gradient")
    notes.extend(p.tuned for p in plans if p.tuned)
    return replace(
        row,
        strategy=" + ".join(p.strategy for p in plans) or "deferred",
        chunks=" + ".join(f"{p.num_chunks} × {p.chunk_rows}" for p in plans),
        chunk_bytes=max((p.chunk_bytes for p in plans), default=0),
        notes=tuple(notes),
    )


def _deferred_from(node: fx.Node, candidate: Candidate, lowered: Lowered) -> bool:
    stack, seen = [node], set()
    while stack:
        current = stack.pop()
        if current in seen:
            continue
        seen.add(current)
        if lowered.heads.get(current) is candidate:
            return True
        stack.extend(current.all_input_nodes)
    return False


def _path(candidate: Candidate, limit: int = 8) -> str:
    """``linear → float → cross_entropy``: the ops downstream of a head, in order."""
    names: list[str] = []
    reached = {candidate.node}
    for node in candidate.node.graph.nodes:
        if node is candidate.node or (
            node.op != "output" and any(a in reached for a in node.all_input_nodes)
        ):
            reached.add(node)
            name = op_name(node)
            if not names or names[-1] != name:
                names.append(name)
    shown = names if len(names) <= limit else [*names[: limit - 1], "…", names[-1]]
    return " → ".join(shown)


def _readable(gm: fx.GraphModule) -> str:
    return gm.print_readable(print_output=False)
