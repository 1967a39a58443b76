"""What estimators learn about a problem and want to know at its next hypergradient."""

from dataclasses import dataclass


@dataclass
class Memory:
    """Lives as long as the owner of a problem wants; a balancer keeps one for all its calls.

    Attributes:
        forward_mode: False where the model turned out to lack forward-mode derivatives, or to have wrong ones; else
            None.
        compare: whether forward-mode products are compared with reverse mode. The mixed product of a `weighted` problem
            does so once and sets this to False; where nothing else vouches for forward mode, each product is compared.
        tolerance: the relative error from which on a comparison disagrees; None for what follows from the dtype.

    Examples:
        >>> memory = Memory()
        >>> memory.compare = True
        >>> vars(memory)
        {'forward_mode': None, 'compare': True, 'tolerance': None}
    """

    forward_mode: bool | None = None
    compare: bool = False
    tolerance: float | None = None
