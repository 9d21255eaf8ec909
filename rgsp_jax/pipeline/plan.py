"""What a merge will do, decided from headers alone: tensors by rule, groups of equal work, items under the budget."""

import json
import math
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import jax
import ml_dtypes
import numpy as np

from rgsp_jax.checkpoint import TensorSpec, format_bytes
from rgsp_jax.linalg import resolve_rank
from rgsp_jax.linalg.cost import count_truncated_svd
from rgsp_jax.method import SQUARES, Method
from rgsp_jax.pipeline.config import MergeConfig, matcher
from rgsp_jax.registry import methods
from rgsp_jax.rules import MatrixView, classify, flatten_view

BLOCK = 1024
"""Elements summed to one number on the device; a tensor starts on a block of its own."""
CHUNK = 16
"""Blocks that one step of the kernel takes. XLA rounds by the shape it compiles for: with one shape, whatever an item
holds, the result does not depend on the memory that is given."""
ITEM_ELEMENTS = 4 * 1024 * 1024
"""Elements of each model in one work item, where single matrices are not larger: enough to hide the overheads."""
PART, MOST_IN_PARTS = 256 * 1024, 2**31 - 1
"""Elements that one step takes of a matrix that is merged part by part, and that such a matrix has at most."""
FACTOR_SHARE = 4
"""Methods that factorise take items so many times smaller: they outweigh the overheads sooner, and progress shows."""
STACK_COPIES, TASK_VECTOR_COPIES = 3, 6
"""Stacks' worth of memory that methods without a decomposition take, and those that rank and mask task vectors."""
MATRIX_SITES, IN_STEP_SITES = frozenset({"full", "sketch", "spectrum"}), frozenset({"moments"})
"""Kinds of site that say something of a matrix's inputs: in a model by itself, and in step with a merge."""
IN_FLIGHT = 3
"""Items in memory at once: one being read, one computed, one written."""

Action = Literal["matrices", "elements", "copy"]


@dataclass(frozen=True)
class InputShape:
    """What covariance files hold of the inputs of a matrix, as one kernel takes it."""

    kind: str
    """full, sketch or spectrum; mixed where models differ, which no method takes."""
    models: int
    width: int
    rows: int
    """Of a sketch, or eigenvectors of a spectrum; 0 of a whole covariance."""
    held_back: int
    """Rows of inputs kept for proof; fewer are filled up with zeros."""

    @property
    def parts(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the arrays of one matrix in one model, named as in the file and in InputStatistics."""
        n = self.width
        arrays: dict[str, dict[str, tuple[int, ...]]] = {
            "full": {"covariance": (n, n)},
            "moments": {"covariance": (n, n), "drift": (n, n)},
            "sketch": {"sketch": (self.rows, n), "trace": ()},
            "spectrum": {"values": (self.rows,), "basis": (n, self.rows), "rest": ()},
        }
        return arrays.get(self.kind, {}) | ({"held_back": (self.held_back, n)} if self.held_back else {})

    @property
    def bytes(self) -> int:
        """Of one matrix."""
        return 4 * self.models * sum(math.prod(shape) for shape in self.parts.values())


@dataclass(frozen=True)
class InputSite:
    """Where the inputs of a tensor lie in a covariance file, from its header."""

    name: str
    kind: str
    width: int
    rows: int
    held_back: int


@dataclass(frozen=True)
class TensorTask:
    """What happens to one tensor of the output."""

    name: str
    shape: tuple[int, ...]
    kind: str
    """matrix, vector, embedding, buffer, excluded, or uncovered: a matrix whose inputs the covariances lack."""
    action: Action
    method: str
    hyperparameters: Mapping[str, Any]
    in_dtypes: tuple[np.dtype, ...]
    """On disk, of every model read (the base last)."""
    out_dtype: np.dtype
    view: MatrixView | None = None
    sites: tuple[str, ...] = ()
    """Of its inputs, in every covariance file that the method takes."""
    inputs: InputShape | None = None

    @property
    def size(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Group:
    """Tensors that one compiled kernel serves."""

    action: Action
    method: str
    hyperparameters: Mapping[str, Any]
    matrix: tuple[int, int]
    """(m, n); (0, 0) where shapes do not matter."""
    in_dtypes: tuple[np.dtype, ...]
    out_dtype: np.dtype
    inputs: InputShape | None = None

    @property
    def key(self) -> str:
        """Text that tells groups apart."""
        names = [d.name for d in (*self.in_dtypes, self.out_dtype)]
        inputs = [asdict(self.inputs)] if self.inputs else []
        facts = [self.action, self.method, dict(self.hyperparameters), self.matrix, names, *inputs]
        return json.dumps(facts, sort_keys=True)


@dataclass(frozen=True)
class Piece:
    """Flat elements [start, start + size) of a tensor, and where they lie in the item: a matrix slot or a block."""

    name: str
    start: int
    size: int
    slot: int


@dataclass(frozen=True)
class WorkItem:
    """The unit of reading, computing, writing and resuming."""

    index: int
    group: Group
    pieces: tuple[Piece, ...]
    capacity: int
    """Matrix slots or blocks of the kernel; the last item of a group may leave some empty."""

    @property
    def steps(self) -> int:
        """Of the kernel, for what the item holds."""
        last = self.pieces[-1]
        return -(-(last.slot + count_rows(self.group, last)) // step_rows(self.group))

    @property
    def bytes_in(self) -> int:
        weights = sum(p.size for p in self.pieces) * sum(d.itemsize for d in self.group.in_dtypes)
        return weights + (len(self.pieces) * self.group.inputs.bytes if self.group.inputs else 0)

    @property
    def bytes_out(self) -> int:
        return sum(p.size for p in self.pieces) * self.group.out_dtype.itemsize


@dataclass(frozen=True)
class MergePlan:
    """Everything decided before a byte of weights is read."""

    tasks: Mapping[str, TensorTask]
    """By name, in the first model's disk order."""
    items: tuple[WorkItem, ...]
    groups: tuple[Group, ...]
    peak_memory: int
    """Bytes above the process's size after import."""
    flops: float
    problems: tuple[str, ...] = field(default=())
    memory: int = 0
    """Bytes that the merge may take so."""

    @property
    def specs(self) -> dict[str, TensorSpec]:
        """Of the output."""
        return {t.name: TensorSpec(t.name, t.shape, t.out_dtype) for t in self.tasks.values()}

    @property
    def bytes_in(self) -> int:
        return sum(item.bytes_in for item in self.items)

    @property
    def bytes_out(self) -> int:
        return sum(item.bytes_out for item in self.items)


def plan_merge(
    config: MergeConfig,
    specs: Sequence[Mapping[str, TensorSpec]],
    *,
    names: Sequence[str] | None = None,
    model_type: str | None = None,
    sites: Sequence[Mapping[str, InputSite]] = (),
    shared_memory: bool | None = None,
) -> MergePlan:
    """Plan the merge of models with these headers; pure.

    Args:
        config: validated settings.
        specs: headers of every model in order, the base (where the config has one) last.
        names: tensors of the output in order; None is all of the first model.
        model_type: of the models' architecture, where known.
        sites: for every covariance file, tensor name -> where its inputs lie.
        shared_memory: the device works in the memory of the host; None is True where it is a CPU.

    Returns:
        The plan; `problems` lists what the settings make impossible (too little memory, a value no tensor allows).
    """
    tasks = {
        name: plan_tensor(config, name, [s[name] for s in specs if name in s], model_type, sites)
        for name in (specs[0] if names is None else names)
    }
    members: dict[str, tuple[Group, list[TensorTask]]] = {}
    for task in tasks.values():
        group = group_of(task)
        members.setdefault(group.key, (group, []))[1].append(task)
    if shared_memory is None:
        shared_memory = jax.default_backend() == "cpu"
    items: list[WorkItem] = []
    problems = find_wrong_sites(config, sites)
    problems += find_hyperparameter_problems(tasks.values()) + find_misfits(tasks.values())
    peak = 0
    # The slowest work first, so that the time left is foretold from it and not from the quick rest.
    ordered = sorted(members.values(), key=lambda member: -cost_per_element(member[1]))
    for group, tensors in ordered:
        capacity, memory = size_item(group, tensors, config.memory, shared_memory)
        if memory > config.memory:
            problems.append(
                f"--memory {format_bytes(config.memory)} is too little: {tensors[0].name} {list(tensors[0].shape)} by"
                f" {group.method} needs {format_bytes(memory)}"
            )
        peak = max(peak, memory)
        items += make_items(group, tensors, capacity, len(items))
    groups = tuple(group for group, _ in ordered)
    flops = sum(estimate_flops(t) for t in tasks.values())
    return MergePlan(tasks, tuple(items), groups, peak, flops, tuple(problems), config.memory)


def plan_tensor(
    config: MergeConfig,
    name: str,
    specs: Sequence[TensorSpec],
    model_type: str | None,
    sites: Sequence[Mapping[str, InputSite]] = (),
) -> TensorTask:
    """The rule, method and dtypes of one tensor."""
    first = specs[0]
    rule = classify(name, first.shape, first.dtype, model_type=model_type)
    method, hyperparameters = settings_for(config, name)
    floating = first.kind == "float"
    out_dtype = np.dtype(getattr(ml_dtypes, config.dtype, config.dtype)) if config.dtype and floating else first.dtype

    def task(
        kind: str, action: Action, method: str, settings: Mapping[str, Any], view: MatrixView | None
    ) -> TensorTask:
        read = specs[:1] if action == "copy" else specs
        dtypes = tuple(s.dtype for s in read)
        return TensorTask(name, first.shape, kind, action, method, settings, dtypes, out_dtype, view)

    def rest(kind: str) -> TensorTask:
        return (
            task(kind, "copy", "copy", {}, None)
            if method.rest == "first"
            else task(kind, "elements", "average", method.rest_settings(hyperparameters, len(config.models)), None)
        )

    if not is_merged(config, name):
        return task("excluded", "copy", "copy", {}, None)
    if rule.kind == "buffer" or first.size == 0:
        return task(rule.kind, "copy", "copy", {}, None)
    if rule.kind != "matrix" and method.scope == "matrices":
        return rest(rule.kind)
    if method.elementwise:
        return task(rule.kind, "elements", method.name, hyperparameters, None)
    view = rule.view if method.scope == "matrices" else flatten_view(first.shape)
    if "covariances" not in method.needs:
        return task(rule.kind, "matrices", method.name, hyperparameters, view)
    found = [of[name] for of in sites if name in of and of[name].kind in kinds_for(method)]
    if not found or len(found) < len(sites):
        return rest("uncovered")
    planned = task(rule.kind, "matrices", method.name, hyperparameters, view)
    return replace(planned, sites=tuple(site.name for site in found), inputs=join_sites(found))


def kinds_for(method: Method) -> frozenset[str]:
    """Kinds of site that a method takes."""
    return IN_STEP_SITES if method.in_step else MATRIX_SITES


def find_wrong_sites(config: MergeConfig, sites: Sequence[Mapping[str, InputSite]]) -> list[str]:
    """Covariance files that the config's method cannot take."""
    method = config.resolved_method()
    if "covariances" not in method.needs:
        return []
    how = "by `rgsp graft` without a ridge" if method.in_step else "by `rgsp covariances`"
    return [
        f"{path}: method {method.name!r} takes covariances collected {how}, and these are others"
        for path, of in zip(config.covariances, sites, strict=True)
        if (kinds := {site.kind for site in of.values()} - {"counts"}) and not kinds & kinds_for(method)
    ]


def join_sites(sites: Sequence[InputSite]) -> InputShape:
    """The shape that holds the inputs of all these models."""
    first = sites[0]
    kind = first.kind if {site.kind for site in sites} == {first.kind} else "mixed"
    return InputShape(kind, len(sites), first.width, first.rows, max(site.held_back for site in sites))


def is_merged(config: MergeConfig, name: str) -> bool:
    """False for tensors that stay as they are in the first model."""
    included = not config.include or any(matcher(p).search(name) for p in config.include)
    left = (*config.exclude, *(config.key_map.keep if config.key_map else ()))
    return included and not any(matcher(p).search(name) for p in left)


def settings_for(config: MergeConfig, name: str) -> tuple[Method, dict[str, Any]]:
    """Method and hyperparameters of a tensor: the config's, changed by the last override that matches."""
    method, hyperparameters = config.resolved_method(), dict(config.hyperparameters)
    for override in reversed(config.overrides):
        if matcher(override.pattern).search(name):
            if override.method and override.method != method.name:
                return methods[override.method], dict(override.hyperparameters)
            return method, method.override(hyperparameters, override.hyperparameters)
    return method, hyperparameters


def group_of(task: TensorTask) -> Group:
    """What one kernel can serve together with this tensor."""
    matrix = task.view.matrices[1:] if task.action == "matrices" and task.view else (0, 0)
    return Group(task.action, task.method, task.hyperparameters, matrix, task.in_dtypes, task.out_dtype, task.inputs)


def size_item(group: Group, tensors: Sequence[TensorTask], memory: int, shared_memory: bool) -> tuple[int, int]:
    """(matrix slots or blocks in one item, bytes of the host's that the merge takes with such items)."""
    unit, step = step_rows(group), step_bytes(group)
    if group.action != "matrices":
        blocks = sum(-(-t.size // BLOCK) for t in tensors)
        steps = max(1, min(-(-blocks // unit), ITEM_ELEMENTS // (unit * BLOCK), memory // (IN_FLIGHT * step)))
        return unit * steps, IN_FLIGHT * steps * step
    m, n = group.matrix
    workspace = matrix_workspace(group) if shared_memory else 0
    slots = sum(t.view.matrices[0] for t in tensors if t.view)
    afford = (memory - workspace) // (IN_FLIGHT * step)
    elements = ITEM_ELEMENTS // (FACTOR_SHARE if is_factorised(group) else 1)
    most = max(1, min(slots, elements // (m * n), afford))
    capacity = -(-slots // -(-slots // most))  # even items, so that padding is least
    return capacity, IN_FLIGHT * capacity * step + workspace


def step_rows(group: Group) -> int:
    """Matrix slots or blocks that one step of the kernel takes: what no two devices share."""
    return CHUNK if group.action == "elements" else 1


def step_bytes(group: Group) -> int:
    """Bytes read and written for the slots or blocks of one step of the kernel."""
    per_element = sum(d.itemsize for d in group.in_dtypes) + group.out_dtype.itemsize
    if group.action != "matrices":
        return step_rows(group) * BLOCK * per_element
    return math.prod(group.matrix) * per_element + (group.inputs.bytes if group.inputs else 0)


def matrix_workspace(group: Group, parts: int = 1) -> int:
    """Bytes one matrix takes on the device while it is merged: its float32 stack and the factors of every model.

    Of one of several devices, where its longer side is divided into so many parts: the shorter side's are whole.
    """
    m, n = group.matrix
    itemsize = max(4, *(d.itemsize for d in group.in_dtypes))
    count = len(group.in_dtypes)
    own = -(-max(m, n) // parts)
    matrix = own * min(m, n)
    if group.inputs:  # the covariance in compute precision, its factor or eigenvectors, and what LAPACK takes
        return ((count + 4) * matrix + 5 * n * n) * itemsize
    if not is_factorised(group):
        copies = TASK_VECTOR_COPIES if "base" in methods[group.method].needs else STACK_COPIES
        if methods[group.method].combination and parts == 1 and matrix <= MOST_IN_PARTS:
            return (copies * count + 1) * min(matrix, PART) * itemsize + 2 * matrix * group.out_dtype.itemsize
        held = copies * count + 1
        if parts > 1:  # XLA holds every part twice where it moves it
            held += count + 1
        return held * matrix * itemsize
    r = count_directions(group.method, group.hyperparameters, count, m, n)
    between = methods[group.method].cost(count, m, n, r).words
    factors = count * (own + min(m, n)) * min(4 * r + 40, min(m, n)) * 3 + between + 3 * min(m, n) ** 2
    if max(m, n) % parts:  # between uneven parts JAX moves the factors by gathering them
        factors += count * max(m, n) * r
    return ((2 * count + 4) * matrix + factors) * itemsize


def is_factorised(work: Group | TensorTask) -> bool:
    """True where matrices are taken apart, which outweighs moving them."""
    method = methods[work.method]
    spared = method.spared is not None and method.spared(len(work.in_dtypes), work.hyperparameters)
    return method.scope == "matrices" and not spared


def rank_of(method: str, hyperparameters: Mapping[str, Any], m: int, n: int) -> int:
    """The rank a method uses on an m x n matrix; full where it has none to set."""
    return resolve_rank(hyperparameters.get("rank", methods[method].defaults.get("rank", min(m, n))), m, n)


def count_directions(method: str, hyperparameters: Mapping[str, Any], models: int, m: int, n: int) -> int:
    """Directions that a method keeps of each of so many m x n matrices."""
    limit = methods[method].limit_rank
    rank = rank_of(method, hyperparameters, m, n)
    return min(rank, limit(models, m, n)) if limit else rank


def count_rows(group: Group, piece: Piece) -> int:
    """Matrix slots or blocks of a piece."""
    return 1 if group.action == "matrices" else -(-piece.size // BLOCK)


def make_items(group: Group, tensors: Sequence[TensorTask], capacity: int, first_index: int) -> list[WorkItem]:
    """Pack the group's tensors into items in order."""
    pieces = list(cut_matrices(tensors) if group.action == "matrices" else cut_elements(tensors, capacity))
    slots: defaultdict[int, list[Piece]] = defaultdict(list)
    for position, piece in pieces:
        slots[position // capacity].append(Piece(piece.name, piece.start, piece.size, position % capacity))
    return [WorkItem(first_index + i, group, tuple(chunk), capacity) for i, chunk in enumerate(slots.values())]


def cut_matrices(tensors: Sequence[TensorTask]) -> Any:
    """(running slot, piece) of every matrix: a tensor of stacked experts gives one piece for each."""
    position = 0
    for task in tensors:
        batch = task.view.matrices[0] if task.view else 1
        size = task.size // batch
        for i in range(batch):
            yield position, Piece(task.name, i * size, size, 0)
            position += 1


def cut_elements(tensors: Sequence[TensorTask], capacity: int) -> Any:
    """(running block, piece): tensors start on a block of their own and are cut where an item ends."""
    position = 0
    for task in tensors:
        start = 0
        while True:
            room = (capacity - position % capacity) * BLOCK
            size = min(task.size - start, room)
            yield position, Piece(task.name, start, size, 0)
            start += size
            position += max(1, -(-size // BLOCK))
            if start >= task.size:
                break


def estimate_flops(task: TensorTask) -> float:
    """Floating-point operations of one tensor, to the leading order."""
    count = len(task.in_dtypes)
    if task.action != "matrices" or task.view is None or not is_factorised(task):
        return 0.0 if task.action == "copy" else 4.0 * count * task.size
    batch, m, n = task.view.matrices
    if task.inputs is not None:  # an eigendecomposition at worst, and the products
        thin = task.inputs.kind in ("sketch", "spectrum")
        return float(batch * ((6 * n * task.inputs.rows**2 if thin else 9 * n**3) + 8 * m * n * n))
    r = count_directions(task.method, task.hyperparameters, count, m, n)
    taken_apart = count * count_truncated_svd(m, n, r)
    put_together = 2 * m * n * r * count + 2 * (m + n) * (count * r) ** 2
    return batch * (taken_apart + put_together + methods[task.method].cost(count, m, n, r).flops)


def cost_per_element(tasks: Sequence[TensorTask]) -> float:
    """FLOPs an element of these tensors takes."""
    return sum(estimate_flops(t) for t in tasks) / max(1, sum(t.size for t in tasks))


def find_misfits(tasks: Collection[TensorTask]) -> list[str]:
    """Matrices whose inputs are of another width than the covariances say, or known too differently to be combined."""
    mixed = [
        f"{task.name}: several models' covariances are combined only where all are whole; give --memory to"
        " `rgsp covariances` for that"
        for task in tasks
        if task.inputs is not None and task.inputs.models > 1 and task.inputs.kind not in ("full", "moments")
    ]
    return mixed + [
        f"{task.name} {list(task.shape)} takes inputs of {task.view.matrices[2]}, its covariance is {task.inputs.width}"
        for task in tasks
        if task.inputs is not None and task.view is not None and task.view.matrices[2] != task.inputs.width
    ]


def find_hyperparameter_problems(tasks: Any) -> list[str]:
    """Values that no tensor's shape allows; each named once."""
    problems = []
    for task in tasks:
        if task.action != "matrices" or "rank" not in task.hyperparameters or task.view is None:
            continue
        try:
            rank = rank_of(task.method, task.hyperparameters, *task.view.matrices[1:])
        except ValueError as error:
            problems.append(f"{task.name}: {error}")
            continue
        sizes = {name: len(task.hyperparameters[name]) for name in SQUARES if task.hyperparameters.get(name)}
        problems += [f"{task.name}: {k} is {n} x {n}, its rank is {rank}" for k, n in sizes.items() if n != rank]
    return problems[:1]
