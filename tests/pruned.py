"""Tiny models with half their experts gone, for tests of what comes after surgery."""

from __future__ import annotations

import torch

from lit_moe.adapters import count_experts, find_sites
from lit_moe.plan import KeepPlan
from lit_moe.surgery import shrink
from lit_moe.testing import tiny_moe


def last_of_each_group(site, num_kept):
    """Ids of the last experts, equally many of every routing group."""
    per_group = site.num_experts // site.num_groups
    stay = num_kept // site.num_groups
    return tuple(e for e in range(site.num_experts) if e % per_group >= per_group - stay)


def pruned(family, *, uneven=False, dtype=torch.float32, **overrides):
    """Return a tiny model without half of its experts and the plan; odd layers keep two more."""
    model = tiny_moe(family, num_hidden_layers=3, **overrides).to(dtype)
    sites = find_sites(model)
    extra = [2 * (i % 2) if uneven else 0 for i in range(len(sites))]
    kept = {
        site.name: last_of_each_group(site, site.num_experts // 2 + more)
        for site, more in zip(sites, extra, strict=True)
    }
    plan = KeepPlan(kept, count_experts(sites))
    shrink(model, plan)
    return model, plan
