"""What a call inside the capture of a CUDA graph needs."""

from typing import Any

from metakd.errors import MetaKDError


def check_capture(balancer: Any) -> None:
    """Check that a call can be captured and replayed, or raise a `MetaKDError`.

    A graph repeats the kernels of one call. So nothing may be read from the device, and no call may differ from the
    next by its number.
    """
    proofs = balancer._proofs
    if not balancer.defer_checks:
        why = "its checks read numbers from the device; build it with defer_checks=True, and call read_checks() often"
    elif balancer.accumulate > 1 or balancer.every > 1:
        why = "accumulate and every make calls differ, but a graph repeats one call; leave both at 1"
    elif balancer._ranks.several:
        why = "its ranks wait for each other; train without graphs"
    elif balancer._calls == 0 or proofs.draws is None:
        why = "its first call, which proves and warms up, must come before, with verify=True"
    elif proofs.draws:
        why = (
            "the student or a term draws random numbers (dropout), and a graph would draw others in each pass; train "
            "without graphs, or without dropout"
        )
    else:
        return
    raise MetaKDError(f"this call cannot be captured in a CUDA graph: {why}")
