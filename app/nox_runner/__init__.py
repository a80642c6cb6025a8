"""The runner: owns the sandbox directory, and does every run and every file operation.

It needs the standard library only, listens on one unix socket, and trusts nobody but the front.
"""

__version__ = "0.1.0"
