"""K samples per prompt: the prompt is prefilled once, all K read its cache and append to caches of their own.

The caches are allocated once at their final size, for all calls of equal shape (`Decoder`). So every decode
step has the same shapes and reads and writes the same tensors: on a GPU it is recorded once, as a CUDA graph,
and replayed. Positions are explicit: nothing depends on padding.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from rlhf.config import RunError, UserError
from rlhf.dist import gather, share, whole
from rlhf.fast import paths
from rlhf.groups import Groups, pack
from rlhf.logprobs import head_logits
from rlhf.model import EOS, PAD, NeoX

BLOCK = 128  # tokens in a block of `sample`; divides Pythia's vocabulary of 50304


@dataclass
class Cache:
    """Keys and values of N prompts and of their N K growing responses, all layers.

    prompt_keys, prompt_values      (L, N, H, P, D)     P = longest prompt here
    response_keys, response_values  (L, N, H, K, R, D)  R = longest possible response
    prompt_bias                     (N, 1, 1, P)        0, and -inf after the end of a shorter prompt
    """

    prompt_keys: Tensor
    prompt_values: Tensor
    response_keys: Tensor
    response_values: Tensor
    prompt_bias: Tensor

    @staticmethod
    def allocate(model: NeoX, N: int, K: int, P: int, R: int) -> "Cache":
        L = model.config.num_hidden_layers
        H = model.config.num_attention_heads
        D = model.config.hidden_size // H
        # zeros, not empty: a masked key is multiplied by a zero weight, and 0 * nan would be nan
        options = {"dtype": model.matmul_dtype, "device": model.device}
        prompt = [torch.zeros(L, N, H, P, D, **options) for _ in range(2)]
        response = [torch.zeros(L, N, H, K, R, D, **options) for _ in range(2)]
        return Cache(*prompt, *response, torch.zeros(N, 1, 1, P, device=model.device))

    def set_lengths(self, lengths: Tensor) -> None:
        """Hides what is behind the end of each prompt, lengths (N,): of an earlier call, or nothing."""
        P = self.prompt_bias.shape[-1]
        outside = torch.arange(P, device=lengths.device) >= lengths[:, None]  # (N, P)
        self.prompt_bias.zero_().masked_fill_(outside[:, None, None], float("-inf"))

    def prefill(self, groups: Groups):
        """The `attend` of the prefill: that of the packed prompts, which also fills the prompt cache."""
        N = self.prompt_keys.shape[1]
        lengths = torch.tensor([P for _, P, _ in groups.segments[:N]])
        # of each of the S tokens before the row's padding: the number of its prompt, and its place there
        prompt = torch.repeat_interleave(lengths).to(groups.ids.device)  # (S,)
        place = groups.positions[: len(prompt)]  # (S,)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            for cache, new in ((self.prompt_keys[layer], k), (self.prompt_values[layer], v)):
                cache[prompt, :, place] = new[: len(prompt)].to(cache.dtype)  # (S, H, D)
            return groups.attend(layer, q, k, v)

        return attend

    def decode(self, time: Tensor):
        """The `attend` of one decode step, for the token at `time` (1,) of each of N K responses.

        Its key and value are added to the cache; it attends to the prompt and to its response so far.
        """

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            N, H, K, R, D = self.response_keys.shape[1:]
            q, k, v = (x.view(N, K, H, D).transpose(1, 2) for x in (q, k, v))  # (N, H, K, D)
            prompt_keys = self.prompt_keys[layer]  # (N, H, P, D)
            prompt_values = self.prompt_values[layer]
            keys = self.response_keys[layer]  # (N, H, K, R, D)
            values = self.response_values[layer]
            keys.index_copy_(3, time, k[..., None, :].to(keys.dtype))
            values.index_copy_(3, time, v[..., None, :].to(values.dtype))
            q = q.to(keys.dtype) * D**-0.5
            prompt_scores = q @ prompt_keys.transpose(-1, -2) + self.prompt_bias  # (N, H, K, P)
            own_scores = (q[..., None, :] @ keys.transpose(-1, -2))[..., 0, :]  # (N, H, K, R)
            future = torch.arange(R, device=q.device) > time  # (R,)
            own_scores = own_scores.masked_fill(future, float("-inf"))
            scores = torch.cat([prompt_scores.float(), own_scores.float()], dim=-1)  # (N, H, K, P + R)
            weights = scores.softmax(-1).to(q.dtype)
            prompt_weights, own_weights = weights.split([prompt_keys.shape[-2], R], dim=-1)
            from_prompt = prompt_weights @ prompt_values  # (N, H, K, D)
            from_own = (own_weights[..., None, :] @ values)[..., 0, :]  # (N, H, K, D)
            out = from_prompt + from_own
            return out.transpose(1, 2).reshape(N * K, H, D).to(v.dtype)

        return attend


def invert(weights: Tensor, share: Tensor) -> Tensor:
    """Index (B, 1) at which the cumulative sum of weights (B, n) first exceeds `share` (B, 1) of the total.

    The share is in [0, 1). The weight at that index is never 0.
    """
    cdf = weights.cumsum(-1)
    total = cdf[:, -1:]
    below_total = torch.nextafter(total, torch.zeros_like(total))
    u = torch.minimum(share * total, below_total)  # rounding may reach the total, which nothing exceeds
    return torch.searchsorted(cdf, u, right=True)


def sample(
    logits: Tensor, temperature: float, top_p: float = 1.0, generator: torch.Generator | None = None,
    noise: Tensor | None = None,
) -> Tensor:
    """One token per row of logits (B, V) -> (B,), from uniform numbers, `noise` (B, 1) or drawn here.

    temperature 0 is greedy; top_p keeps the smallest set of tokens with at least that much probability.

    The cumulative distribution is inverted: on a CPU torch.multinomial of (32, 50304) takes 20 times as long.
    From a large vocabulary first a block of tokens is drawn, then a token of that block: sums are vectorised,
    a long cumulative sum is not.
    """
    if temperature == 0:
        return logits.argmax(-1)
    probs = logits.float() / temperature
    probs = probs.sub_(probs.amax(-1, keepdim=True)).exp_()  # `invert` takes shares of their sum
    if top_p < 1:
        probs, order = probs.sort(-1, descending=True)
        before = probs.cumsum(-1) - probs  # (B, V): of all tokens ahead in the order
        probs = probs.masked_fill(before >= top_p * probs.sum(-1, keepdim=True), 0.0)
    share = noise
    if share is None:
        share = torch.rand(len(probs), 1, generator=generator, device=probs.device)
    if probs.shape[-1] % BLOCK or probs.shape[-1] < 64 * BLOCK:
        token = invert(probs, share)  # (B, 1)
    else:
        blocks = probs.view(len(probs), -1, BLOCK)  # (B, V / BLOCK, BLOCK)
        sums = blocks.sum(-1)  # (B, V / BLOCK)
        block = invert(sums, share)  # (B, 1)
        cdf = sums.cumsum(-1)
        above = cdf.gather(1, block) - share * cdf[:, -1:]  # the block's part above the drawn point
        share = (1 - above / sums.gather(1, block)).clamp(0, 1)  # uniform again, within the block
        probs = blocks.gather(1, block[..., None].expand(-1, -1, BLOCK))[:, 0]  # (B, BLOCK)
        token = block * BLOCK + invert(probs, share)  # (B, 1)
    if top_p < 1:
        token = order.gather(1, token)
    return token[:, 0]


def records(device: torch.device) -> bool:
    return device.type == "cuda" and not paths.plain


def recorded(step: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """`step` as a CUDA graph, one launch for all its kernels: it always reads and writes the same tensors.

    To be called after a first ordinary step: what allocates or initialises itself lazily must have done so.
    Under autocast the graph reads the bfloat16 copies of the weights that this first step made; it must not
    outlive the outermost autocast context.
    """
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            out = step()
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise RunError(f"a decode step cannot be recorded as a CUDA graph ({error}): --plain does without it "
                       "(slower)") from error

    def replay() -> Tensor:
        graph.replay()
        return out

    return replay


def mixed_logits(heads: list[Tensor], hidden: list[Tensor], mixture: float) -> Tensor:
    """Next-token logits (B, V) from heads (V, C) and hidden states (B, C) of one model, or of model and
    reference."""
    logits = [head_logits(h, head) for h, head in zip(hidden, heads)]  # (B, V) each
    return logits[0] if len(logits) == 1 else (1 - mixture) * logits[0] + mixture * logits[1]


def check_vocabularies(models: list[NeoX]) -> None:
    sizes = [m.config.vocab_size for m in models]
    if len(set(sizes)) > 1:
        raise UserError(f"a mixture of models needs one vocabulary: the model has {sizes[0]} tokens, "
                        f"the reference {sizes[1]}; take models of one, or --mixture=0")


class Decoder:
    """Decode steps of N prompts of at most P tokens with K responses of at most R tokens each.

    It serves any number of calls with these sizes, as long as the weights stay, inside one autocast context:
    the tensors that a step reads and writes stay the same, and so does a recorded graph of it.
    """

    def __init__(self, models: list[NeoX], N: int, K: int, P: int, R: int, mixture: float):
        device = models[0].device
        self.models = models
        self.shape = (N, K, P, R)
        self.mixture = mixture
        self.caches = [Cache.allocate(m, N, K, P, R) for m in models]
        self.heads = [m.embed_out.weight.detach().to(m.matmul_dtype) for m in models]  # (V, C) each
        self.new = torch.zeros(N * K, dtype=torch.long, device=device)
        self.positions = torch.zeros(N * K, dtype=torch.long, device=device)
        self.time = torch.zeros(1, dtype=torch.long, device=device)
        self.replay = None  # the recorded step
        self.stepped = False

    def prefill(self, prompts: list[list[int]]) -> Tensor:
        """Starts anew with these prompts: logits (N K, V) of the first tokens."""
        N, K = self.shape[:2]
        device = self.new.device
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)  # (N,)
        self.positions.copy_(lengths.repeat_interleave(K))
        self.time.zero_()
        groups = pack(prompts, [[]] * N, max_positions=self.shape[2], device=device)
        ends = torch.tensor([start + P - 1 for start, P, _ in groups.segments[:N]], device=device)
        hidden = []
        for model, cache in zip(self.models, self.caches):
            cache.set_lengths(lengths)
            hidden.append(model(groups.ids, groups.positions, cache.prefill(groups))[ends])  # (N, C)
        logits = mixed_logits(self.heads, hidden, self.mixture)  # (N, V)
        return logits.repeat_interleave(K, 0)  # (N K, V): the K samples start from the same distribution

    def plain_step(self) -> Tensor:
        hidden = [
            model(self.new, self.positions, cache.decode(self.time))
            for model, cache in zip(self.models, self.caches)
        ]  # (N K, C) each
        return mixed_logits(self.heads, hidden, self.mixture)  # (N K, V)

    def step(self, tokens: Tensor) -> Tensor:
        """Appends tokens (N K,) to the responses: the logits (N K, V) of the tokens after them."""
        self.new.copy_(tokens)
        if self.replay is None and self.stepped and records(self.new.device):
            self.replay = recorded(self.plain_step)
        logits = (self.replay or self.plain_step)()
        self.stepped = True
        self.positions += 1
        self.time += 1
        return logits


def make_decoder(
    model: NeoX, prompts: list[list[int]], N: int, K: int, R: int, reference: NeoX | None = None,
    mixture: float = 0.0,
) -> Decoder:
    """For N at a time of these prompts. Raises the UserErrors of `generate`."""
    models = [model, reference] if 0 < mixture < 1 else [reference if mixture else model]
    check_vocabularies(models)
    context = min(m.config.max_position_embeddings for m in models)
    longest = max(map(len, prompts))
    if longest + R > context:
        raise UserError(f"a prompt of {longest} tokens and {R} new ones are more than the model's context "
                        f"({context}): lower --response_tokens, or prepare shorter prompts")
    return Decoder(models, N, K, longest, R, mixture)


@torch.no_grad()
def generate(
    model: NeoX, prompts: list[list[int]], K: int, max_new_tokens: int, *,
    temperature: float = 1.0, top_p: float = 1.0, generator: torch.Generator | None = None,
    reference: NeoX | None = None, mixture: float = 0.0, decoder: Decoder | None = None,
    noise: Tensor | None = None,
) -> tuple[list[list[list[int]]], Tensor]:
    """K sampled responses to each of N prompts; temperature, top_p and noise (N, K, R) as in `sample`.

    mixture  every token is drawn from softmax((1 - mixture) logits + mixture reference's logits), the
             geometric mixture of model and reference: 0 is the model alone, 1 the reference alone.
    decoder  of these models and sizes, from `make_decoder`; default: one of its own.
    Returns the token ids, [N][K][length], each up to and including its first EOS, and `ended` (N, K) bool:
    whether there was one within `max_new_tokens`.
    Raises UserError if prompt plus response would leave the model's context.
    """
    N = len(prompts)
    R = max_new_tokens
    device = model.device
    with model.autocast():
        decoder = decoder or make_decoder(model, prompts, N, K, R, reference, mixture)
        tokens = torch.full((N * K, R), PAD, device=device)
        ended = torch.zeros(N * K, dtype=torch.bool, device=device)
        logits = decoder.prefill(prompts)  # (N K, V)
        for t in range(R):
            given = None if noise is None else noise[..., t].reshape(N * K, 1)
            new = sample(logits, temperature, top_p, generator, given)  # (N K,)
            tokens[:, t] = torch.where(ended, PAD, new)
            ended |= new == EOS
            if t == R - 1:
                break
            ask = device.type == "cpu" or t % 8 == 7  # on CUDA the question costs a sync
            if ask and bool(ended.all()):
                break
            logits = decoder.step(new)
    lengths = torch.where(ended, (tokens == EOS).int().argmax(1) + 1, R)  # (N K,)
    rows = [row[:length] for row, length in zip(tokens.tolist(), lengths.tolist())]
    return [rows[n * K : (n + 1) * K] for n in range(N)], ended.view(N, K).cpu()


def generate_all(
    model: NeoX, prompts: list[list[int]], K: int, max_new_tokens: int, *, batch: int,
    temperature: float = 0.0, top_p: float = 1.0, generator: torch.Generator | None = None,
    reference: NeoX | None = None, mixture: float = 0.0, progress: str | None = None,
) -> tuple[list[list[list[int]]], Tensor]:
    """`generate` over any number of prompts, `batch` at a time, with a progress bar named `progress`.

    The random numbers are drawn for all prompts at once: neither `batch` nor the number of ranks (torchrun),
    which share the prompts, changes a sample.
    """
    options = {"temperature": temperature, "top_p": top_p, "mixture": mixture}
    model = whole(model) if mixture < 1 else model
    reference = whole(reference) if mixture > 0 else reference
    noise = None
    if temperature > 0:
        place = generator.device if generator else model.device
        noise = torch.rand(len(prompts), K, max_new_tokens, generator=generator, device=place)
        noise = noise.to(model.device)
    slices = share(len(prompts), batch)
    hidden = None if progress else True  # None: shown on a terminal only
    parts = []
    decoder = None
    with model.autocast():  # a recorded step reads copies of the weights that live as long as this context
        for s in tqdm(slices, desc=progress, disable=hidden, leave=False):
            some = prompts[s]
            own = noise if noise is None else noise[s]
            if records(model.device) and not (decoder and decoder.shape[0] == len(some)):
                decoder = None  # its memory first
                sizes = (len(some), K, max_new_tokens)
                decoder = make_decoder(model, prompts, *sizes, reference, mixture)
            parts.append(generate(
                model, some, K, max_new_tokens, reference=reference, decoder=decoder, noise=own, **options,
            ))
    parts = gather(parts, slices)
    responses = [row for part, _ in parts for row in part]
    return responses, torch.cat([ended for _, ended in parts])
