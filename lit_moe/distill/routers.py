"""What the routers of a model say during one forward, with gradients."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from lit_moe.adapters import adapter_for
from lit_moe.adapters.site import MoESite


@contextmanager
def recorded_routers(
    model: PreTrainedModel, sites: Sequence[MoESite]
) -> Iterator[dict[str, Tensor]]:
    """Yield a dictionary that each forward inside the block fills: layer -> probabilities (T, E).

    Routed experts only; a layer that does not run is not there.
    """
    adapter = adapter_for(model.config)
    seen: dict[str, Tensor] = {}

    def record(site: MoESite) -> Any:
        def hook(router: nn.Module, _: Any, output: Any) -> None:
            seen[site.name] = adapter.router_probabilities(site, output, router)

        return hook

    with ExitStack() as stack:
        for site in sites:
            hook = model.get_submodule(site.router).register_forward_hook(record(site))
            stack.callback(hook.remove)
        yield seen
