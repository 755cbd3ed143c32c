"""The ops of a MoE block, registered in the namespace `diffulex` (`torch.ops.diffulex.moe_*`).

T tokens, K experts per token, N = T*K slots (slot n belongs to token n // K), E experts, H hidden, I expert width,
J = 2I gated, I otherwise. `moe_route -> moe_dispatch -> moe_expert_up -> moe_expert_down -> moe_combine`. The two
`..._shared` take the products of a shared expert, an MLP of width S over every token, into the same stage, and
`moe_route_linear` the router's product into the first one: passes insert them.
"""

from ._specialized import expert_gemm_specialized
from .moe_combine import moe_combine
from .moe_dispatch import moe_dispatch
from .moe_expert_down import moe_expert_down
from .moe_expert_down_shared import moe_expert_down_shared
from .moe_expert_grad_weight import moe_expert_grad_weight
from .moe_expert_up import moe_expert_up
from .moe_expert_up_shared import moe_expert_up_shared
from .moe_route import moe_route
from .moe_route_linear import moe_route_linear

ALL_OPS = (
    moe_route,
    moe_dispatch,
    moe_expert_up,
    moe_expert_down,
    moe_expert_grad_weight,
    moe_combine,
    moe_expert_up_shared,
    moe_expert_down_shared,
    moe_route_linear,
)
ROUTE_OPS = (moe_route, moe_route_linear)
UP_OPS = (moe_expert_up, moe_expert_up_shared)
DOWN_OPS = (moe_expert_down, moe_expert_down_shared)

__all__ = [
    "ALL_OPS",
    "DOWN_OPS",
    "ROUTE_OPS",
    "UP_OPS",
    "expert_gemm_specialized",
    "moe_combine",
    "moe_dispatch",
    "moe_expert_down",
    "moe_expert_down_shared",
    "moe_expert_grad_weight",
    "moe_expert_up",
    "moe_expert_up_shared",
    "moe_route",
    "moe_route_linear",
]
