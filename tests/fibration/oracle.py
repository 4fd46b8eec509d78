"""A slow reading of the maths: python loops over tokens, levels and partitions, gradients by autograd.

Shares nothing with the package: nodes are dictionary keys, aggregates are sums over all tokens at every
level (no tower property), gates are `if`s.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Case:
    """One mini-batch; tensors are float64 [N], ids int64 [N], share [N, P]."""

    x: Tensor
    advantages: Tensor
    weights: Tensor
    ids: dict[str, Tensor]
    share: Tensor | None = None
    labels: dict[str, Tensor] = field(default_factory=dict)
    """Per key the number of each id in tables of budgets and chains; ids of other keys are their own."""
    old: Tensor | None = None
    """Old log-probs, for objectives that read them."""

    def number(self, key: str, i: int) -> int:
        at = int(self.ids[key][i])
        return int(self.labels[key][at]) if key in self.labels else at

    def call(self, objective, part: Tensor | None = None, **options):
        take = (lambda t: t) if part is None else (lambda t: t[part])
        share = None if self.share is None else take(self.share)
        return objective(
            take(self.x),
            take(self.advantages),
            take(self.weights),
            keys={key: take(ids) for key, ids in self.ids.items()},
            expert_share=share,
            labels=self.labels,
            old_log_probs=None if self.old is None else take(self.old),
            **options,
        )


@dataclass
class Spec:
    """What the fibred objective is configured with."""

    levels: list[list[str]] | dict
    budgets: dict[str, tuple[float, float] | dict]
    epsilon: tuple[float, float] = (0.2, 0.2)
    soft: bool = True
    dual_clip: float | None = None
    unclip_positive: bool = False
    pessimistic: bool = False
    k_max: float | None = None
    extra: dict = field(default_factory=dict)

    def chains(self) -> dict:
        """The chain of each listed number of a tree's key, and "*"."""
        if isinstance(self.levels, list):
            return {"*": self.levels}
        return {number: chain for number, chain in self.levels.items() if number != "by"}

    def chain_of(self, case: Case, i: int) -> list[list[str]]:
        chains = self.chains()
        number = case.number(self.levels["by"], i) if isinstance(self.levels, dict) else "*"
        return chains[number] if number in chains else chains["*"]

    def level_name(self, chain: list[list[str]], depth: int) -> str:
        having = [str(number) for number, other in self.chains().items() if place(chain, depth) in places(other)]
        name = "+".join(chain[depth])
        return name if len(having) == len(self.chains()) else f"{','.join(having)}:{name}"

    def level_names(self) -> set[str]:
        return {self.level_name(chain, depth) for chain in self.chains().values() for depth in range(len(chain))}

    def budget(self, case: Case, i: int, p: int, depth: int) -> tuple[float, float]:
        """That of the node of token i and partition p at one level of the token's chain."""
        chain = self.chain_of(case, i)
        given = self.budgets[self.level_name(chain, depth)]
        if not isinstance(given, dict):
            return given
        by = given.get("by", chain[depth][0])
        number = p if by == "expert" else case.number(by, i)
        return given[number] if number in given else given["*"]

    def build(self, build_objective, name: str = "fiberpo"):
        uses_experts = any("expert" in level for chain in self.chains().values() for level in chain)
        return build_objective(
            name,
            epsilon=self.epsilon,
            budgets=self.budgets,
            levels=self.levels,
            expert_membership=("soft" if self.soft else "hard") if uses_experts else None,
            dual_clip=self.dual_clip,
            unclip_positive=self.unclip_positive,
            pessimistic=self.pessimistic,
            k_max=self.k_max,
        )


def place(chain: list[list[str]], depth: int) -> tuple:
    """What tells a level from those of other chains: its keys and those of all that is coarser."""
    return tuple(tuple(sorted(level)) for level in chain[depth:])


def places(chain: list[list[str]]) -> list[tuple]:
    return [place(chain, depth) for depth in range(len(chain))]


def slow_gate(residual: Tensor, budget: float, k: float) -> Tensor:
    """Equation 4 of arXiv:2604.03044, one number."""
    size = abs(float(residual.detach()))
    if size <= budget:
        return residual
    if size < (1 + 1 / k) * budget:
        sign = 1.0 if float(residual.detach()) > 0 else -1.0
        return sign * (k + 1) * budget - k * residual
    return residual * 0.0


def slow_clip(value: Tensor, low: float, high: float) -> Tensor:
    if float(value.detach()) < low:
        return value * 0.0 + low
    if float(value.detach()) > high:
        return value * 0.0 + high
    return value


def kernel(case: Case, spec: Spec) -> list[list[tuple[int, float]]]:
    """Per token its (partition, share) pairs; [(0, 1)] where its chain has no experts."""
    out = []
    for i in range(case.x.shape[0]):
        if not any("expert" in level for level in spec.chain_of(case, i)):
            out.append([(0, 1.0)])
            continue
        row = case.share[i].tolist()
        out.append(list(enumerate(row)) if spec.soft else [(row.index(max(row)), 1.0)])
    return out


def node_of(case: Case, spec: Spec, depth: int, i: int, p: int) -> tuple:
    """The node of a token and a partition at one level of the token's chain."""
    chain = spec.chain_of(case, i)
    return place(chain, depth), tuple(p if key == "expert" else int(case.ids[key][i]) for key in sorted(chain[depth]))


def slow_fiber(case: Case, spec: Spec) -> tuple[Tensor, Tensor, Tensor]:
    """(G [N], gradient [N], J) of the fibred objective as docs/fibration.md defines it, for chains and trees."""
    x = case.x.clone().requires_grad_(True)
    shares = kernel(case, spec)
    clamped = [xi if abs(float(xi)) <= 20 else xi * 0.0 + (20.0 if float(xi) > 0 else -20.0) for xi in x]
    sums = _node_sums(case, spec, shares, clamped)
    log_weight = {}
    for node, (mass, k, s_plus, s_minus, (i, p, depth)) in sums.items():
        c_plus, c_minus = spec.budget(case, i, p, depth)
        d_plus, d_minus = s_plus / mass, s_minus / mass
        if depth + 1 < len(spec.chain_of(case, i)):
            above = sums[node_of(case, spec, depth + 1, i, p)]
            d_plus, d_minus = d_plus - above[2] / above[0], d_minus - above[3] / above[0]
        k = max(k, 1.0) if spec.k_max is None else min(max(k, 1.0), spec.k_max)
        log_weight[node] = slow_gate(d_plus, c_plus, k) - slow_gate(d_minus, c_minus, k)
    ratio = torch.stack([_token(case, spec, i, clamped[i], shares[i], sums, log_weight) for i in range(len(shares))])
    return _finish(case, x, ratio)


def _node_sums(case, spec, shares, clamped) -> dict:
    """Per node its mass, its tokens, the sums of both channels, and a token, partition and depth that lead to it."""
    table: dict = {}
    zero = torch.zeros((), dtype=torch.float64)
    for i, x in enumerate(clamped):
        mu = float(case.weights[i])
        plus, minus = (x, zero) if float(x) >= 0 else (zero, -x)
        for depth in range(len(spec.chain_of(case, i))):
            for p, share in shares[i]:
                if mu == 0.0 or share == 0.0:
                    continue
                node = node_of(case, spec, depth, i, p)
                mass, k, s_plus, s_minus, seen = table.get(node, (0.0, 0.0, 0.0, 0.0, (i, p, depth)))
                weight = mu * share
                table[node] = (mass + weight, k + share, s_plus + weight * plus, s_minus + weight * minus, seen)
    return table


def _token(case, spec, i, x, pairs, sums, log_weight) -> Tensor:
    advantage = float(case.advantages[i])
    raw = torch.exp(x)
    if spec.dual_clip is not None and not spec.pessimistic and advantage < 0 and float(x) > 0:
        return slow_clip(raw, 0.0, spec.dual_clip)
    if spec.unclip_positive and advantage > 0 and float(x) < 0:
        return raw
    epsilon = spec.epsilon[0] if advantage > 0 else spec.epsilon[1]
    lifted = spec.dual_clip is not None and not spec.pessimistic and advantage < 0
    upper = float("inf") if lifted else epsilon
    s_plus = s_minus = total = torch.zeros((), dtype=torch.float64)
    for p, share in pairs:
        node = node_of(case, spec, 0, i, p)
        if share == 0.0 or node not in sums:
            continue
        mass, _, sum_plus, sum_minus, _ = sums[node]
        s_plus, s_minus = s_plus + share * sum_plus / mass, s_minus + share * sum_minus / mass
        for depth in range(len(spec.chain_of(case, i))):
            total = total + share * log_weight[node_of(case, spec, depth, i, p)]
    if float(x) >= 0:
        fiber = slow_clip(x - s_plus, -epsilon, upper) - slow_clip(-s_minus, -epsilon, upper)
    else:
        fiber = slow_clip(x + s_minus, -epsilon, upper) - slow_clip(s_plus, -epsilon, upper)
    gated = torch.exp(fiber + total)
    if not spec.pessimistic or advantage == 0:
        return gated
    best = raw if float(raw) * advantage < float(gated) * advantage else gated
    if spec.dual_clip is not None and advantage < 0 and float(best) > spec.dual_clip:
        return best * 0.0 + spec.dual_clip
    return best


def slow_gspo(case: Case, epsilon: tuple[float, float], token: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """GSPO-token (arXiv:2507.18071, equations 13 and 14): sg[s_i] r_t / sg[r_t]. Without `token` GSPO itself."""
    x = case.x.clone().requires_grad_(True)
    ratio = []
    for i in range(x.shape[0]):
        same = [j for j in range(x.shape[0]) if case.ids["trajectory"][j] == case.ids["trajectory"][i]]
        s = torch.exp(sum(x[j] for j in same) / len(same))
        if token:
            s = s.detach() * torch.exp(x[i] - x[i].detach())
        bounds = (0.0, 1 + epsilon[0]) if float(case.advantages[i]) >= 0 else (1 - epsilon[1], float("inf"))
        ratio.append(slow_clip(s, *bounds))
    return _finish(case, x, torch.stack(ratio))


def slow_gmpo(case: Case, epsilon: tuple[float, float]) -> tuple[Tensor, Tensor, Tensor]:
    """GMPO (arXiv:2507.20673, equation 4), written with products and powers of ratios; tokens of one trajectory have
    one advantage."""
    x = case.x.clone().requires_grad_(True)
    ratio = []
    for i in range(x.shape[0]):
        same = [j for j in range(x.shape[0]) if case.ids["trajectory"][j] == case.ids["trajectory"][i]]
        sign = 1.0 if float(case.advantages[i]) >= 0 else -1.0
        product = torch.ones((), dtype=torch.float64)
        for j in same:
            r = torch.exp(x[j])
            clipped = slow_clip(r, math.exp(-epsilon[1]), math.exp(epsilon[0]))
            product = product * (r**sign if float(r) ** sign <= float(clipped) ** sign else clipped**sign)
        ratio.append(product ** (sign / len(same)))
    return _finish(case, x, torch.stack(ratio))


def slow_sapo(case: Case, tau_positive: float, tau_negative: float) -> tuple[Tensor, Tensor, Tensor]:
    """SAPO (arXiv:2511.20347) with the constant that makes its gate 1 on-policy."""
    x = case.x.clone().requires_grad_(True)
    ratio = []
    for i in range(x.shape[0]):
        tau = tau_positive if float(case.advantages[i]) > 0 else tau_negative
        ratio.append(torch.sigmoid(tau * (torch.exp(x[i]) - 1)) * 4 / tau - 2 / tau + 1)
    return _finish(case, x, torch.stack(ratio))


def slow_dppo(case: Case, epsilon: tuple[float, float]) -> tuple[Tensor, Tensor, Tensor]:
    """DPPO with the binary total variation (arXiv:2602.04879)."""
    x = case.x.clone().requires_grad_(True)
    ratio = []
    for i in range(x.shape[0]):
        before, now = math.exp(float(case.old[i])), math.exp(float(case.old[i]) + float(case.x[i]))
        out = now - before > epsilon[0] if float(case.advantages[i]) > 0 else now - before < -epsilon[1]
        ratio.append(torch.exp(x[i]) * (0.0 if out else 1.0))
    return _finish(case, x, torch.stack(ratio))


def slow_apc(case: Case, delta: float, key: str) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens of weight 0 are no samples; an id of -1 is a node of one token."""
    x = case.x.clone().requires_grad_(True)
    r = torch.exp(x)
    ratio = []
    for i in range(x.shape[0]):
        node = int(case.ids[key][i])
        same = [
            j
            for j in range(x.shape[0])
            if float(case.weights[j]) > 0 and (j == i or (node >= 0 and int(case.ids[key][j]) == node))
        ]
        others = [(r[j] - 1).abs() for j in same if j != i]
        bound = len(same) * delta - sum(others, torch.zeros((), dtype=torch.float64))
        bound = bound if float(bound) > 0 else bound * 0.0
        change = r[i] - 1
        if abs(float(change)) > float(bound) or float(bound) == 0.0:  # an interval of no width is flat
            change = bound if float(change) > 0 else -bound
        ratio.append(1 + change)
    return _finish(case, x, torch.stack(ratio))


def slow_ppo(case: Case, epsilon: tuple[float, float], dual_clip: float | None = None):
    x = case.x.clone().requires_grad_(True)
    ratio = []
    for i in range(x.shape[0]):
        r, advantage = torch.exp(x[i]), float(case.advantages[i])
        clipped = slow_clip(r, 1 - epsilon[1], 1 + epsilon[0])
        best = r if float(r) * advantage <= float(clipped) * advantage else clipped
        if dual_clip is not None and advantage < 0:
            best = slow_clip(best, 0.0, dual_clip)
        ratio.append(best)
    return _finish(case, x, torch.stack(ratio))


def _finish(case: Case, x: Tensor, ratio: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    value = (case.weights * case.advantages * ratio).sum()
    (gradient,) = torch.autograd.grad(value, x)
    return ratio.detach(), gradient, value.detach()


def random_case(seed: int, *, trajectories: int = 6, longest: int = 6, partitions: int = 3, scale: float = 0.3) -> Case:
    """Ids nested from turn to all, and of weight versions and engines; ragged lengths from one token; exact zeros among
    the log ratios."""
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest + 1, (trajectories,), generator=draw)
    trajectory = torch.repeat_interleave(torch.arange(trajectories), lengths)
    n = trajectory.shape[0]
    ids = {"trajectory": trajectory}
    group = torch.arange(trajectories)
    for key, size in (("pair", 4), ("prompt_group", 3), ("half", 2), ("domain", 2), ("all", 1)):
        parents = torch.randint(0, size, (int(group.max()) + 1,), generator=draw)
        group = parents[group]
        ids[key] = group[trajectory]
    within = torch.arange(n) - torch.repeat_interleave(lengths.cumsum(0) - lengths, lengths)
    ids["turn"] = torch.unique(trajectory * longest + within // 2, return_inverse=True)[1]  # of two tokens
    ids["weight_version"], ids["engine"] = within // 3, trajectory % 2
    share = torch.rand(n, partitions, generator=draw, dtype=torch.float64)
    share = share * (torch.rand(n, partitions, generator=draw, dtype=torch.float64) < 0.7)
    share[:, 0] += (share.sum(1) == 0).double()
    weights = torch.rand(n, generator=draw, dtype=torch.float64) + 0.1
    x = torch.randn(n, generator=draw, dtype=torch.float64) * scale
    x[torch.rand(n, generator=draw) < 0.15] = 0.0
    advantages = torch.randn(n, generator=draw, dtype=torch.float64)
    states = torch.Generator().manual_seed(1000 + seed)  # -1 is a state that was sampled once
    ids["state"] = torch.randint(-1, 4, (n,), generator=states)
    old = -x.clamp(min=0) - 0.05 - 4 * torch.rand(n, generator=states, dtype=torch.float64)
    return Case(x, advantages, weights / weights.sum(), ids, share / share.sum(1, keepdim=True), old=old)
