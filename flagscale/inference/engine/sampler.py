"""From logits to tokens, for a batch of samples that each ask for something else.

Two ideas keep it small. Every truncation (top-k, top-p, min-p) is one threshold on a row's logits, so the settings of
all rows meet in one vector; ties at a threshold stay in. And the randomness of a token is a single number, a digest of
the request's seed, the sample's index and the token's place: what else is in the batch cannot change it, nor can being
preempted. The token is where that number falls in the cumulative distribution, in the order of the vocabulary.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

import torch

from flagscale.inference.engine.outputs import TokenLogprob
from flagscale.inference.engine.sampling import SamplingParams

FIRST_CANDIDATES = 256
"""how many of the largest logits are looked at first to find a nucleus; eight times as many at each further look"""


@dataclass(frozen=True, slots=True)
class SampleRow:
    """One row of logits, and whose next token it decides.

    forbidden: tokens that must not come, whatever the settings say
    """

    params: SamplingParams
    seed: int
    index: int
    prompt: Sequence[int]
    output: Sequence[int]
    forbidden: Sequence[int] = ()


@dataclass(frozen=True, slots=True)
class Choice:
    """A chosen token; None where the logits were not numbers, or every token was forbidden."""

    token: int | None
    logprob: TokenLogprob | None = None


def uniform(seed: int, index: int, position: int) -> float:
    """The number in [0, 1) that decides token `position` of sample `index`."""
    digest = blake2b(b"%d %d %d" % (seed, index, position), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53


def choose(logits: torch.Tensor, rows: Sequence[SampleRow]) -> list[Choice]:
    """A token for each row of float32 logits [rows, vocabulary], which are used up."""
    broken = _mend_broken(logits)
    raw = _take_raw(logits, rows)
    for i, row in enumerate(rows):
        _edit(logits[i], row)
    broken |= _mend_broken(logits)
    tokens = logits.argmax(-1)
    drawn = [i for i, row in enumerate(rows) if row.params.temperature > 0]
    if drawn:
        at = torch.tensor(drawn, device=logits.device)
        kept = _truncate(logits if len(drawn) == len(rows) else logits[at], [rows[i].params for i in drawn])
        tokens[at] = _draw(kept, [uniform(rows[i].seed, rows[i].index, len(rows[i].output)) for i in drawn])
        logits[at] = kept
    chosen: list[int] = tokens.tolist()
    sampled = _take_sampled(logits, rows, chosen)
    return [
        Choice(None)
        if i in broken
        else Choice(chosen[i], _look_up(raw.get(i, sampled.get(i)), chosen[i], row.params.logprobs))
        for i, row in enumerate(rows)
    ]


def _mend_broken(logits: torch.Tensor) -> set[int]:
    """The rows without a largest finite logit, which are made harmless for what follows."""
    broken = (~logits.amax(-1).isfinite()).nonzero()[:, 0]
    if len(broken):
        logits[broken] = 0.0
    return set(broken.tolist())


def prompt_logprobs(logits: torch.Tensor, tokens: Sequence[int], top: int) -> list[TokenLogprob]:
    """The raw log-probability of each of `tokens` under its row of logits [tokens, vocabulary]."""
    table = torch.log_softmax(logits.float(), -1)
    chosen = table.gather(-1, torch.tensor(tokens, device=table.device)[:, None])[:, 0].tolist()
    best = _top(table, top)
    return [TokenLogprob(token, chosen[i], best[i]) for i, token in enumerate(tokens)]


def _top(table: torch.Tensor, count: int) -> list[tuple[tuple[int, float], ...]]:
    values, ids = table.topk(min(count, table.shape[-1]), dim=-1)
    return [tuple(zip(*pair, strict=True)) for pair in zip(ids.tolist(), values.tolist(), strict=True)]


def _look_up(table: torch.Tensor | None, token: int, top: int | None) -> TokenLogprob | None:
    if table is None or top is None:
        return None
    return TokenLogprob(token, float(table[token]), _top(table[None], top)[0])


def _take_raw(logits: torch.Tensor, rows: Sequence[SampleRow]) -> dict[int, torch.Tensor]:
    asked = [i for i, row in enumerate(rows) if row.params.logprobs is not None and row.params.logprobs_of == "raw"]
    table = torch.log_softmax(logits[asked], -1) if asked else logits
    return {i: table[at] for at, i in enumerate(asked)}


def _take_sampled(logits: torch.Tensor, rows: Sequence[SampleRow], chosen: list[int]) -> dict[int, torch.Tensor]:
    """After truncation; at temperature 0 the distribution is a single point."""
    asked = [i for i, row in enumerate(rows) if row.params.logprobs is not None and row.params.logprobs_of == "sampled"]
    if not asked:
        return {}
    table = torch.log_softmax(logits[asked], -1)
    for at, i in enumerate(asked):
        if rows[i].params.temperature == 0:
            table[at] = -torch.inf
            table[at, chosen[i]] = 0.0
    return {i: table[at] for at, i in enumerate(asked)}


def _edit(logits: torch.Tensor, row: SampleRow) -> None:
    """Penalties, bias and what is forbidden, in place on one row."""
    params = row.params
    if params.repetition_penalty != 1:
        seen = torch.tensor(sorted({*row.prompt, *row.output}), device=logits.device)
        values = logits[seen]
        logits[seen] = torch.where(values > 0, values / params.repetition_penalty, values * params.repetition_penalty)
    if row.output and (params.presence_penalty or params.frequency_penalty):
        ids, counts = torch.tensor(row.output, device=logits.device).unique(return_counts=True)
        logits[ids] -= params.presence_penalty + params.frequency_penalty * counts
    if params.logit_bias:
        ids = torch.tensor(list(params.logit_bias), device=logits.device)
        logits[ids] += torch.tensor(list(params.logit_bias.values()), dtype=logits.dtype, device=logits.device)
    if row.forbidden:
        logits[list(row.forbidden)] = -torch.inf


def _truncate(logits: torch.Tensor, params: Sequence[SamplingParams]) -> torch.Tensor:
    """Logits after temperature, -inf for what top-k, top-p and min-p leave out."""
    temperature = torch.tensor([each.temperature for each in params], dtype=logits.dtype, device=logits.device)
    # From the largest down, so that a temperature near 0 cannot overflow to infinity and two infinities to NaN.
    scaled = (logits - logits.amax(-1, keepdim=True)) / temperature[:, None]
    num_tokens = logits.shape[-1]
    top_k = torch.tensor([min(each.top_k or num_tokens, num_tokens) for each in params], device=logits.device)
    top_p = torch.tensor([each.top_p for each in params], dtype=torch.float64, device=logits.device)
    min_p = [math.log(each.min_p) if each.min_p > 0 else -math.inf for each in params]
    least = torch.tensor(min_p, dtype=logits.dtype, device=logits.device)
    cut = ((top_k < num_tokens) | (top_p < 1)).nonzero()[:, 0]
    if len(cut):
        least[cut] = torch.maximum(least[cut], _find_thresholds(scaled[cut], top_k[cut], top_p[cut]))
    return scaled.masked_fill_(scaled < least[:, None], -torch.inf)


def _find_thresholds(logits: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """For each row the smallest logit that top-k, and then top-p over what it left, would keep."""
    num_tokens = logits.shape[-1]
    limited = top_k < num_tokens
    width = max(FIRST_CANDIDATES, int(top_k[limited].max()) if bool(limited.any()) else 0)
    least = torch.full_like(logits[:, 0], -torch.inf)
    todo = torch.arange(len(logits), device=logits.device)
    while len(todo):
        width = min(width, num_tokens)
        rows = logits[todo]
        best = rows.topk(width, dim=-1).values
        kth = best.gather(-1, (top_k[todo] - 1).clamp(max=width - 1)[:, None])
        kth = torch.where(limited[todo][:, None], kth, -torch.inf)
        whole = torch.where(rows >= kth, rows, -torch.inf).double().logsumexp(-1, keepdim=True)
        mass = (best.double() - whole).exp_().cumsum_(-1)
        # The first place where the mass is reached; what is reached only by rounding counts as reached.
        place = (mass < (top_p[todo] - 1e-9)[:, None]).sum(-1, keepdim=True)
        nucleus = torch.where(top_p[todo][:, None] < 1, best.gather(-1, place.clamp(max=width - 1)), -torch.inf)
        least[todo] = torch.maximum(kth, nucleus)[:, 0]
        unsure = (place[:, 0] >= width) & ~limited[todo] & (top_p[todo] < 1)
        todo = todo[unsure] if width < num_tokens else todo[:0]
        width *= 8
    return least


def _draw(logits: torch.Tensor, numbers: Sequence[float]) -> torch.Tensor:
    """Where each number falls in its row's cumulative distribution."""
    mass = torch.softmax(logits, -1).cumsum(-1, dtype=torch.float64)
    total = mass[:, -1:]
    target = torch.tensor(numbers, dtype=torch.float64, device=logits.device)[:, None] * total
    target = torch.minimum(target, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(mass, target, right=True)[:, 0]
