"""What can go wrong with a lab and is told in its own words, without a traceback.

Owns: the one class that the command line (beside OSError) and the pytest plugin catch, and how it is told. It imports
nothing, so that a command need not import what it does not use to know its errors.
"""


class TestbedError(Exception):
    """The lab, the file or the machine is not as it should be; the message is for a person."""

    __test__ = False  # pytest takes what is called Test... for tests, also where somebody imported it


def in_words(error: BaseException) -> str:
    """The message of an error, and the notes that were added to it."""
    return "\n".join((str(error) or type(error).__name__, *getattr(error, "__notes__", ())))
