"""What can go wrong with a lab and is told in its own words, without a traceback.

Owns: the one class that the command line catches, beside OSError. It imports nothing, so that a command need not import
what it does not use to know its errors.
"""


class TestbedError(Exception):
    """The lab, the file or the machine is not as it should be; the message is for a person."""

    __test__ = False  # pytest takes what is called Test... for tests, also where somebody imported it
