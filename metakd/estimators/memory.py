"""What estimators learn about a problem and need at its next hypergradient."""

from dataclasses import dataclass


@dataclass
class Memory:
    """What estimators learn about a problem; a balancer keeps one memory for all its calls.

    Attributes:
        forward_mode: False if the model lacks forward-mode derivatives or has wrong ones; else None.
        compare: whether to compare forward-mode products with reverse mode. The mixed product of a `weighted` problem
            does so once and sets this to False; for other problems each product is compared.
        compare_products: whether to compare the next product by a double backward with differences of gradients; the
            comparison sets this to False.
        tolerance: the largest relative error in comparisons; None to derive it from the dtype.

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
