"""From logits to tokens, for a batch of samples that each ask for something else.

Two ideas keep it small. Every truncation (top-k, top-p, min-p) is one threshold on a row's logits, so the settings of
all rows meet in one vector; ties at a threshold stay in. And the randomness of a token is a single number, a digest of
the request's seed, the sample's index and the token's place: what else is in the batch cannot change it, nor can being
preempted. The token is where that number falls in the cumulative distribution, in the order of the vocabulary.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

import torch

from flagscale.inference.engine.outputs import TokenLogprob
from flagscale.inference.engine.sampling import SamplingParams
from flagscale.inference.engine.staging import stage

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
    """A token for each row of float32 logits [rows, vocabulary], which are used up.

    The device is waited for once, when the tokens are read, and again where log-probabilities are.
    """
    sound = logits.amax(-1).isfinite()
    raw = _Table.make(logits, rows, "raw")
    for i, row in enumerate(rows):
        _edit(logits[i], row)
    best, tokens = logits.max(-1)
    sound &= best.isfinite()
    drawn = [i for i, row in enumerate(rows) if row.params.temperature > 0]
    if drawn:
        at = stage(drawn, logits.device)
        kept = _truncate(logits if len(drawn) == len(rows) else logits[at], [rows[i].params for i in drawn])
        tokens[at] = _draw(kept, [uniform(rows[i].seed, rows[i].index, len(rows[i].output)) for i in drawn])
        logits[at] = kept
    found = {**raw.read(tokens, rows), **_Table.make(logits, rows, "sampled").read(tokens, rows)}
    chosen: list[int] = torch.where(sound, tokens, -1).tolist()
    return [Choice(None) if token < 0 else Choice(token, found.get(i)) for i, token in enumerate(chosen)]


def prompt_logprobs(logits: torch.Tensor, tokens: Sequence[int], top: int) -> list[TokenLogprob]:
    """The raw log-probability of each of `tokens` under its row of logits [tokens, vocabulary]."""
    table = torch.log_softmax(logits.float(), -1)
    chosen = table.gather(-1, stage(tokens, table.device)[:, None])[:, 0].tolist()
    best = _top(table, top)
    return [TokenLogprob(token, chosen[i], best[i]) for i, token in enumerate(tokens)]


def _top(table: torch.Tensor, count: int) -> list[tuple[tuple[int, float], ...]]:
    values, ids = table.topk(min(count, table.shape[-1]), dim=-1)
    return [tuple(zip(*pair, strict=True)) for pair in zip(ids.tolist(), values.tolist(), strict=True)]


@dataclass(frozen=True, slots=True)
class _Table:
    """Log-probabilities [rows that asked, vocabulary] of one distribution, and which rows asked."""

    asked: list[int]
    logprobs: torch.Tensor

    @classmethod
    def make(cls, logits: torch.Tensor, rows: Sequence[SampleRow], which: str) -> "_Table":
        asked = [i for i, row in enumerate(rows) if row.params.logprobs is not None and row.params.logprobs_of == which]
        return cls(asked, torch.log_softmax(logits[stage(asked, logits.device)], -1) if asked else logits[:0])

    def read(self, tokens: torch.Tensor, rows: Sequence[SampleRow]) -> dict[int, TokenLogprob]:
        """What each row that asked is told; at temperature 0 the sampled distribution is a single point."""
        if not self.asked:
            return {}
        chosen = tokens[stage(self.asked, tokens.device)]
        params = [rows[i].params for i in self.asked]
        certain = [at for at, each in enumerate(params) if each.temperature == 0 and each.logprobs_of == "sampled"]
        if certain:
            at = stage(certain, tokens.device)
            self.logprobs[at] = -torch.inf
            self.logprobs[at, chosen[at]] = 0.0
        values = self.logprobs.gather(-1, chosen[:, None])[:, 0].tolist()
        best = _top(self.logprobs, max(each.logprobs or 0 for each in params))
        told = zip(chosen.tolist(), values, best, params, strict=True)
        return {
            i: TokenLogprob(token, value, top[: each.logprobs])
            for i, (token, value, top, each) in zip(self.asked, told, strict=True)
        }


def _edit(logits: torch.Tensor, row: SampleRow) -> None:
    """Penalties, bias and what is forbidden, in place on one row."""
    params = row.params
    if params.repetition_penalty != 1:
        seen = stage(sorted({*row.prompt, *row.output}), logits.device)
        values = logits[seen]
        logits[seen] = torch.where(values > 0, values / params.repetition_penalty, values * params.repetition_penalty)
    if row.output and (params.presence_penalty or params.frequency_penalty):
        counts = Counter(row.output)
        ids, times = stage(list(counts), logits.device), stage(list(counts.values()), logits.device, logits.dtype)
        logits[ids] -= params.presence_penalty + params.frequency_penalty * times
    if params.logit_bias:
        ids = stage(list(params.logit_bias), logits.device)
        logits[ids] += stage(list(params.logit_bias.values()), logits.device, logits.dtype)
    if row.forbidden:
        logits[stage(list(row.forbidden), logits.device)] = -torch.inf


def _truncate(logits: torch.Tensor, params: Sequence[SamplingParams]) -> torch.Tensor:
    """Logits after temperature, -inf for what top-k, top-p and min-p leave out."""
    temperature = stage([each.temperature for each in params], logits.device, logits.dtype)
    # From the largest down, so that a temperature near 0 cannot overflow to infinity and two infinities to NaN.
    scaled = (logits - logits.amax(-1, keepdim=True)) / temperature[:, None]
    min_p = [math.log(each.min_p) if each.min_p > 0 else -math.inf for each in params]
    least = stage(min_p, logits.device, logits.dtype)
    cut = [i for i, each in enumerate(params) if 0 < each.top_k < logits.shape[-1] or each.top_p < 1]
    if cut:
        at = stage(cut, logits.device)
        least[at] = torch.maximum(least[at], _find_thresholds(scaled[at], [params[i] for i in cut]))
    return scaled.masked_fill_(scaled < least[:, None], -torch.inf)


def _find_thresholds(logits: torch.Tensor, params: Sequence[SamplingParams]) -> torch.Tensor:
    """For each row the smallest logit that top-k, and then top-p over what it left, would keep."""
    num_tokens = logits.shape[-1]
    ks = [min(each.top_k or num_tokens, num_tokens) for each in params]
    width = max([FIRST_CANDIDATES, *(k for k in ks if k < num_tokens)])
    top_k, top_p = stage(ks, logits.device), stage([each.top_p for each in params], logits.device, torch.float64)
    limited = top_k < num_tokens
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
        if width == num_tokens or all(k < num_tokens for k in ks):
            break
        todo = todo[(place[:, 0] >= width) & ~limited[todo] & (top_p[todo] < 1)]
        width *= 8
    return least


def _draw(logits: torch.Tensor, numbers: Sequence[float]) -> torch.Tensor:
    """Where each number falls in its row's cumulative distribution."""
    mass = torch.softmax(logits, -1).cumsum(-1, dtype=torch.float64)
    total = mass[:, -1:]
    target = stage(numbers, logits.device, torch.float64)[:, None] * total
    target = torch.minimum(target, torch.nextafter(total, torch.zeros_like(total)))
    # Where the logits are no numbers, nothing is found.
    return torch.searchsorted(mass, target, right=True)[:, 0].clamp_(max=logits.shape[-1] - 1)
