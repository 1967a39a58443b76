"""The one exception type of the library."""


class MetaKDError(Exception):
    """Something the library cannot do, with its cause and its cure in the message.

    Every message quotes what was wrong (names, shapes, numbers) and says what to change. Whatever was
    under way when it is raised has been undone: the student, its optimizer and the weight model are bit
    for bit what they were before the call.

    Example:
        >>> raise MetaKDError("no terms were given; pass at least one, e.g. {'hard': CrossEntropy()}")
        Traceback (most recent call last):
        ...
        metakd.errors.MetaKDError: no terms were given; pass at least one, e.g. {'hard': CrossEntropy()}
    """
