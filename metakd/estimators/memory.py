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
        compare_products: whether the next product by a double backward is compared with differences of gradients, which
            sets this to False.
        tolerance: the relative error from which on a comparison disagrees; None for what follows from the dtype.

    Examples:
        >>> memory = Memory()
        >>> memory.compare = True
        >>> vars(memory)
        {'forward_mode': None, 'compare': True, 'compare_products': False, 'tolerance': None}
    """

    forward_mode: bool | None = None
    compare: bool = False
    compare_products: bool = False
    tolerance: float | None = None
