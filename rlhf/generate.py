"""K samples per prompt: the prompt is prefilled once, its K samples read the one prompt cache and append to caches of their own.

The caches are allocated once per call at their final size, so every decode step has the same shapes and reads and writes the same tensors: on a GPU it is
recorded once and replayed (a CUDA graph). Positions are explicit everywhere: nothing depends on padding (recipe 9.1, pitfall 1).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from rlhf.config import UserError
from rlhf.groups import Groups, pack
from rlhf.model import EOS, PAD, NeoX

BLOCK = 128  # tokens of the vocabulary whose probabilities are summed before one of them is chosen; divides Pythia's 50304


@dataclass
class Cache:
    """Keys and values of N prompts and of their N K growing responses, all layers.

    prompt_keys, prompt_values      (L, N, H, P, D)     P = longest prompt here; shorter ones are masked by prompt_bias (N, 1, 1, P)
    response_keys, response_values  (L, N, H, K, R, D)
    """

    prompt_keys: Tensor
    prompt_values: Tensor
    response_keys: Tensor
    response_values: Tensor
    prompt_bias: Tensor

    @staticmethod
    def allocate(model: NeoX, prompt_lengths: list[int], K: int, R: int) -> "Cache":
        c, device, dtype = model.config, model.device, model.matmul_dtype
        L, H, D = c.num_hidden_layers, c.num_attention_heads, c.hidden_size // c.num_attention_heads
        N, P = len(prompt_lengths), max(prompt_lengths)
        lengths = torch.tensor(prompt_lengths, device=device)
        outside = torch.arange(P, device=device) >= lengths[:, None]  # (N, P)
        bias = torch.zeros(N, P, device=device).masked_fill(outside, float("-inf"))[:, None, None]  # (N, 1, 1, P)
        # zeros, not empty: a masked key is multiplied by a zero weight, and 0 * nan would be nan
        prompt = [torch.zeros(L, N, H, P, D, dtype=dtype, device=device) for _ in range(2)]
        response = [torch.zeros(L, N, H, K, R, D, dtype=dtype, device=device) for _ in range(2)]
        return Cache(*prompt, *response, bias)

    def prefill(self, groups: Groups):
        """The `attend` of the prefill: ordinary attention over the packed prompts, which also fills the prompt cache."""
        lengths = torch.tensor([P for _, P, _ in groups.segments[: self.prompt_keys.shape[1]]])
        prompt = torch.repeat_interleave(lengths).to(groups.ids.device)  # (T without padding,): whose token
        place = groups.positions[: len(prompt)]

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            for cache, new in ((self.prompt_keys[layer], k), (self.prompt_values[layer], v)):
                cache[prompt, :, place] = new[: len(prompt)].to(cache.dtype)  # (T, H, D), one kernel for all prompts
            return groups.attend(layer, q, k, v)

        return attend

    def decode(self, time: Tensor):
        """The `attend` of one decode step: the new token of each of N K sequences, written at `time` (1,), reads the prompt and its own past."""

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            N, H, K, R, D = self.response_keys.shape[1:]
            q, k, v = (x.view(N, K, H, D).transpose(1, 2) for x in (q, k, v))  # (N, H, K, D)
            self.response_keys[layer].index_copy_(3, time, k[:, :, :, None].to(self.response_keys.dtype))
            self.response_values[layer].index_copy_(3, time, v[:, :, :, None].to(self.response_values.dtype))
            q = q.to(self.response_keys.dtype) * D**-0.5
            to_prompt = q @ self.prompt_keys[layer].transpose(-1, -2) + self.prompt_bias  # (N, H, K, P)
            to_own = (q[..., None, :] @ self.response_keys[layer].transpose(-1, -2))[..., 0, :]  # (N, H, K, R)
            future = torch.arange(R, device=q.device) > time
            to_own = to_own.masked_fill(future, float("-inf"))
            weights = torch.cat([to_prompt.float(), to_own.float()], dim=-1).softmax(-1).to(q.dtype)  # (N, H, K, P + R)
            on_prompt, on_own = weights.split([to_prompt.shape[-1], R], dim=-1)
            out = on_prompt @ self.prompt_values[layer] + (on_own[..., None, :] @ self.response_values[layer])[..., 0, :]
            return out.transpose(1, 2).reshape(N * K, H, D).to(v.dtype)

        return attend


def invert(weights: Tensor, share: Tensor) -> Tensor:
    """weights (B, n), share (B, 1) in [0, 1) -> (B, 1): where the cumulative sum first exceeds that share of the total; never a weight of 0."""
    cdf = weights.cumsum(-1)
    total = cdf[:, -1:]
    u = torch.minimum(share * total, torch.nextafter(total, torch.zeros_like(total)))  # rounding may reach the total, where nothing is
    return torch.searchsorted(cdf, u, right=True)


def sample(logits: Tensor, temperature: float, top_p: float = 1.0, generator: torch.Generator | None = None) -> Tensor:
    """One token per row of logits (B, V) -> (B,). temperature 0 is greedy; top_p keeps the smallest set of tokens with that much probability.

    Draws by inverting the cumulative distribution, where torch.multinomial on (32, 50304) takes 20 times as long on a CPU. A large vocabulary in two steps,
    first a block of tokens and then the token in it: sums are vectorised and a long cumulative sum is not.
    """
    if temperature == 0:
        return logits.argmax(-1)
    probs = logits.float() / temperature
    probs = probs.sub_(probs.amax(-1, keepdim=True)).exp_()  # up to a factor: the last entry of the cumulative sum is the total
    if top_p < 1:
        probs, order = probs.sort(-1, descending=True)
        probs = probs.masked_fill(probs.cumsum(-1) - probs >= top_p * probs.sum(-1, keepdim=True), 0.0)
    share = torch.rand(len(probs), 1, generator=generator, device=probs.device)
    if probs.shape[-1] % BLOCK or probs.shape[-1] < 64 * BLOCK:
        token = invert(probs, share)  # (B, 1)
    else:
        blocks = probs.view(len(probs), -1, BLOCK)  # (B, V / BLOCK, BLOCK)
        sums = blocks.sum(-1)  # (B, V / BLOCK)
        block = invert(sums, share)  # (B, 1)
        cdf = sums.cumsum(-1)
        after = cdf.gather(1, block) - share * cdf[:, -1:]  # of that block's sum, what lies above the drawn point
        inside = (1 - after / sums.gather(1, block)).clamp(0, 1)  # uniform again, within the block
        token = block * BLOCK + invert(blocks.gather(1, block[..., None].expand(-1, -1, BLOCK))[:, 0], inside)  # (B, 1)
    return (order.gather(1, token) if top_p < 1 else token)[:, 0]


def recorded(step: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """`step`, which reads and writes the same tensors at every call, as a CUDA graph: one launch for some hundred kernels.

    To be called after a first ordinary step: what allocates or initialises itself lazily must have done so. Under autocast the bfloat16 copies of the
    weights that this first step made are what the graph reads, so a graph lives no longer than the surrounding autocast context.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()

    def replay() -> Tensor:
        graph.replay()
        return out

    return replay


@torch.no_grad()
def generate(
    model: NeoX, prompts: list[list[int]], K: int, max_new_tokens: int, *,
    temperature: float = 1.0, top_p: float = 1.0, generator: torch.Generator | None = None,
) -> tuple[list[list[list[int]]], Tensor]:
    """K sampled responses to each of N prompts.

    Returns the token ids, [N][K][length], each up to and including its first EOS, and `ended` (N, K) bool:
    whether there was one within `max_new_tokens`. temperature 0 is greedy.
    Raises UserError if prompt plus response would leave the model's context.
    """
    N, R, device = len(prompts), max_new_tokens, model.device
    context, longest = model.config.max_position_embeddings, max(map(len, prompts))
    if longest + R > context:
        raise UserError(f"a prompt of {longest} tokens and {R} new ones are more than the model's context ({context})")
    tokens = torch.full((N * K, R), PAD, device=device)
    ended = torch.zeros(N * K, dtype=torch.bool, device=device)

    # what changes from one decode step to the next
    new = torch.zeros(N * K, dtype=torch.long, device=device)
    positions = torch.tensor([len(p) for p in prompts], device=device).repeat_interleave(K)  # (N K,)
    time = torch.zeros(1, dtype=torch.long, device=device)

    def step() -> Tensor:
        return model.embed_out(model(new, positions, cache.decode(time))).float()  # (N K, V)

    with model.autocast():
        groups = pack(prompts, [[]] * N, max_positions=context, device=device)
        cache = Cache.allocate(model, [len(p) for p in prompts], K, R)
        hidden = model(groups.ids, groups.positions, cache.prefill(groups))  # (T, C)
        ends = torch.tensor([start + P - 1 for start, P, _ in groups.segments[:N]], device=device)
        logits = model.embed_out(hidden[ends]).float()  # (N, V)
        logits = logits.repeat_interleave(K, 0)  # (N K, V): the K samples start from the same distribution
        decode = step
        for t in range(R):
            new.copy_(sample(logits, temperature, top_p, generator))
            tokens[:, t] = torch.where(ended, PAD, new)
            ended |= new == EOS
            if t == R - 1:
                break
            if (t % 8 == 7 or device.type == "cpu") and bool(ended.all()):  # on CUDA the question costs a sync
                break
            if t == 1 and device.type == "cuda":
                decode = recorded(step)
            logits = decode()
            positions += 1
            time += 1
    lengths = torch.where(ended, (tokens == EOS).int().argmax(1) + 1, R).tolist()
    rows = [row[:length] for row, length in zip(tokens.tolist(), lengths)]
    return [rows[n * K : (n + 1) * K] for n in range(N)], ended.view(N, K).cpu()


def generate_all(
    model: NeoX, prompts: list[list[int]], K: int, max_new_tokens: int, *, batch: int,
    temperature: float = 0.0, top_p: float = 1.0, generator: torch.Generator | None = None,
    progress: str | None = None,
) -> tuple[list[list[list[int]]], Tensor]:
    """`generate` over any number of prompts, `batch` at a time, with a progress bar named `progress`."""
    responses, ended = [], []
    options = {"temperature": temperature, "top_p": top_p, "generator": generator}
    hidden = None if progress else True  # None: shown on a terminal only
    for start in tqdm(range(0, len(prompts), batch), desc=progress, disable=hidden, leave=False):
        some = generate(model, prompts[start : start + batch], K, max_new_tokens, **options)
        responses += some[0]
        ended.append(some[1])
    return responses, torch.cat(ended)
