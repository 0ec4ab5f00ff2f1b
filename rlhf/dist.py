"""Several devices (torchrun), on PyTorch's own FSDP2: the only file that knows about ranks.

Sharded: weights, gradients and Adam's state of a training script's models, by rows. A layer is whole while it
computes; embedding and head from a forward to its backward. Layer norms (0.01 % of the weights) are whole on
every rank. Split: the model's work. Every rank knows the whole batch, computes its share of the micro-batches
(`deal`), and what all computed comes back in the order of the batch (`gather`). Gradients are summed, so a
loss is divided by the count of the whole batch. On one device every function here gives back what it gets.

What keeps ranks from waiting for each other for ever:
1. A sharded model runs equally often on every rank (`deal`); ranks decode on copies of it (`whole`).
2. What one rank does alone touches no sharded tensor.
3. Every decision is made from numbers that all ranks have.
"""

import io
import os
import re
import sys
import time
import traceback
from collections.abc import Callable
from datetime import timedelta

import torch
from torch import Tensor, nn

from rlhf.config import RunError, UserError

LAUNCHED = "RANK" in os.environ and "WORLD_SIZE" in os.environ  # by torchrun
RANK = int(os.environ["RANK"]) if LAUNCHED else 0
RANKS = int(os.environ["WORLD_SIZE"]) if LAUNCHED else 1
FIRST = RANK == 0  # the rank that writes and speaks

if LAUNCHED:
    from torch import distributed
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
    from torch.distributed.tensor import DTensor


# --- the group of ranks


def join(device: str, timeout: float) -> str:
    """The device of this rank, in a group of all ranks that wait at most `timeout` seconds for each other."""
    if not LAUNCHED:
        return device
    kind, _, number = device.partition(":")
    if kind == "cuda":
        local = int(os.environ["LOCAL_WORLD_SIZE"])
        if number:
            raise UserError(f"--device={device} with {RANKS} ranks: give --device=cuda, each takes its own")
        if torch.cuda.device_count() < local:
            raise UserError(f"{local} ranks on a machine with {torch.cuda.device_count()} GPUs: "
                            f"--nproc_per_node is at most that")
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    if not distributed.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo"
        distributed.init_process_group(backend, timeout=timedelta(seconds=timeout))
    return device


def leave() -> None:
    """Ends the group. Without the barrier one process in 24 aborted here: a thread of gloo that still holds
    the tensors of the last exchange needs Python to free them, while Python ends; a barrier gives it time."""
    if LAUNCHED and distributed.is_initialized():
        distributed.barrier()
        distributed.destroy_process_group()


def hush() -> None:
    """The other ranks do as the first one does, silently, but for an error of their own."""
    if not FIRST:
        sys.stdout = sys.stderr = open(os.devnull, "w")
        sys.excepthook = lambda *error: traceback.print_exception(*error, file=sys.__stderr__)


def last_word(message: str) -> None:
    """An error, of the first rank that has one: torchrun ends the others at once."""
    if not FIRST:
        time.sleep(10)  # where all have the same error, the first rank tells it
    print(message, file=sys.__stderr__ if not FIRST else sys.stderr, flush=True)
    if LAUNCHED:
        sys.stdout.flush()


def refuse(message: str) -> None:
    """UserError, of the first rank; the others, which have the same one, wait for torchrun to end them."""
    if not FIRST:
        time.sleep(600)
    raise UserError(message)


def lost(error: RuntimeError) -> str | None:
    """What an error of the network says about another rank; None for any other error."""
    said = str(error)
    if not LAUNCHED:
        return None
    if re.search("[Tt]imed? ?out|Timeout", said):
        return f"rank {RANK} waited for another rank until the timeout (--rank_timeout): does one hang?"
    if re.search("Connection (closed|reset)|Broken pipe|NCCL", said):
        return f"rank {RANK} lost another rank: that one has ended ({said.splitlines()[0]})"
    return None


def exchange(value) -> list:
    """What each rank has, the first rank's first."""
    if not LAUNCHED:
        return [value]
    values = [None] * RANKS
    distributed.all_gather_object(values, value)
    return values


def agree(facts: dict[str, object]) -> None:
    """Raises UserError, on every rank, if one has another value than the first."""
    values = exchange(facts)
    for rank, other in enumerate(values):
        if different := [name for name in facts if other[name] != values[0][name]]:
            raise UserError(f"rank {rank} has another {different[0]} than rank 0: all ranks need the same")


def on_first(work: Callable):
    """What `work` returned, or raised, on the first rank, on all of them. It begins when all have come: what
    they read before, it has not changed yet."""
    if RANKS == 1:
        return work()
    distributed.barrier()
    said = [None, None]
    if FIRST:
        try:
            said[0] = work()
        except (UserError, RunError, OSError) as error:
            said[1] = error
    distributed.broadcast_object_list(said)
    if said[1] is not None:
        raise said[1]
    return said[0]


def check_prompts(prompts: int) -> None:
    if prompts < RANKS:
        raise UserError(f"{RANKS} ranks share the {prompts} prompts of an optimizer step: each needs one; "
                        "start fewer (--nproc_per_node) or raise --batch_size")


# --- work


def share(n: int, most: int) -> list[slice]:
    """This rank's share of n prompts, cut into slices of at most `most`."""
    begin = n * RANK // RANKS
    end = n * (RANK + 1) // RANKS
    return [slice(i, min(i + most, end)) for i in range(begin, end, most)]


def deal(slices: list[slice]) -> list[slice]:
    """This rank's share of a batch's micro-batches, in turns, equally many for each rank: the longest are
    halved until the number divides; where all are of one prompt, some are joined in pairs. Of fewer prompts
    than ranks, which no optimizer step has (`check_prompts`), the last one is computed several times."""
    slices = list(slices)
    while left := len(slices) % RANKS:
        sizes = [s.stop - s.start for s in slices]  # prompts
        i = sizes.index(max(sizes))
        start, stop = slices[i].start, slices[i].stop
        middle = (start + stop) // 2
        if sizes[i] > 1:
            slices[i : i + 1] = [slice(start, middle), slice(middle, stop)]
            continue
        if len(slices) < RANKS:
            slices += [slices[-1]] * (RANKS - left)
            break
        pairs = zip(slices[: 2 * left : 2], slices[1 : 2 * left : 2])
        slices[: 2 * left] = [slice(a.start, b.stop) for a, b in pairs]
    return slices[RANK::RANKS]


def gather(parts: list, slices: list[slice]) -> list:
    """What all ranks computed, one part for each of their slices of the batch, in the order of the batch."""
    if RANKS == 1:
        return parts
    own = io.BytesIO()
    torch.save({s.start: part for s, part in zip(slices, parts, strict=True)}, own)

    def here(storage, place: str):
        return storage if place == "cpu" else storage.cuda()  # another rank's device becomes this one's

    found = {}  # by the first prompt
    for other in exchange(own.getvalue()):
        found |= torch.load(io.BytesIO(other), map_location=here)
    return [found[start] for start in sorted(found)]


# --- a sharded model


def shard(model: nn.Module) -> None:
    """Splits a NeoX on the meta device, in place; `own_rows` tells which rows of a weight are this rank's.

    Layers are gathered in `matmul_dtype`: of a float32 gather autocast would keep bfloat16 copies until the
    backward.
    """
    device = "cuda" if distributed.get_backend() != "gloo" else "cpu"
    mesh = init_device_mesh(device, (RANKS,))
    norms = [module for module in model.modules() if isinstance(module, nn.LayerNorm)]
    ignored = {parameter for norm in norms for parameter in norm.parameters()}
    narrow = MixedPrecisionPolicy(
        param_dtype=model.matmul_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    for layer in model.gpt_neox.layers:
        fully_shard(layer, mesh=mesh, mp_policy=narrow, ignored_params=ignored)
    fully_shard(model, mesh=mesh, ignored_params=ignored)
    for unit in units(model):
        unit.set_gradient_divide_factor(1.0)
        unit.set_force_sum_reduction_for_comms(True)  # gloo has no product with a factor


def units(model: nn.Module) -> list:
    return [module for module in model.modules() if isinstance(module, FSDPModule)] if LAUNCHED else []


def parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The named parameters, sharded: what is written into a gathered weight is lost, and a gathered layer is
    rounded to bfloat16."""
    for unit in units(model):
        unit.reshard()
    return dict(model.named_parameters())


def is_sharded(parameter: Tensor) -> bool:
    return LAUNCHED and isinstance(parameter, DTensor)


def own_rows(parameter: Tensor) -> tuple[Tensor, slice]:
    """The memory that this rank has of a parameter, and which rows these are."""
    if not is_sharded(parameter):
        return parameter, slice(0, len(parameter))
    rows = -(-len(parameter) // RANKS)
    start = min(RANK * rows, len(parameter))
    return parameter.to_local(), slice(start, min(start + rows, len(parameter)))


@torch.no_grad()
def fill(parameter: Tensor, values: Tensor) -> None:
    """Copies the whole of `values` into a parameter, or this rank's rows of it."""
    own, rows = own_rows(parameter)
    own.copy_(values[rows])


def full(parameter: Tensor) -> Tensor:
    """A parameter as a plain tensor; all ranks ask for it."""
    return parameter.detach().full_tensor() if is_sharded(parameter) else parameter.detach()


def whole(model: nn.Module) -> nn.Module:
    """A copy for inference that knows nothing of ranks: each may run it as often as it has work. Its matrices
    are in `matmul_dtype`; on one device it is the model itself."""
    if not units(model):
        return model
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    weights = {}
    for name, parameter in parameters(model).items():
        narrow = name.rpartition(".")[0] in linear and not name.startswith("score.")
        own = parameter.detach()
        weights[name] = full(own.to(model.matmul_dtype) if narrow else own)
    with torch.device("meta"):
        copy = type(model)(model.config, model.head)
    copy.load_state_dict(weights, strict=False, assign=True)
    if model.config.tie_word_embeddings and model.head == "embed_out":
        copy.embed_out.weight = copy.gpt_neox.embed_in.weight
    copy.matmul_dtype = model.matmul_dtype
    return copy.eval().requires_grad_(False)


def by_kind(parameters: list[Tensor]) -> list[list[Tensor]]:
    """Sharded ones and whole ones, which no operator takes together; on one device all in one list."""
    kinds = [[p for p in parameters if is_sharded(p)], [p for p in parameters if not is_sharded(p)]]
    return [kind for kind in kinds if kind]


@torch.no_grad()
def sum_gradients(parameters: list[Tensor]) -> None:
    """Over the ranks, of the parameters that FSDP leaves whole: it has summed the others in the backward."""
    grads = [p.grad for p in parameters if p.grad is not None and not is_sharded(p)]
    if RANKS == 1 or not grads:
        return
    flat = torch.cat([grad.flatten() for grad in grads])
    distributed.all_reduce(flat)
    for grad, total in zip(grads, flat.split([grad.numel() for grad in grads])):
        grad.copy_(total.view_as(grad))


def gradient_norm(grads: list[Tensor]) -> float:
    norm = nn.utils.get_total_norm(grads)
    return (norm.full_tensor() if is_sharded(norm) else norm).item()
