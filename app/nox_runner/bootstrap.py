"""Starts the Python program inside the sandbox. Its text is given to `python3 -I -c`.

`-I` keeps the working directory out of `sys.path`: it is shared, and a `json.py` or
`sitecustomize.py` planted there would otherwise break or capture the start of every later run. It
is added here, last, so that what was put can be imported but shadows nothing; nor does it stand
in for what the host's Python lacks (`_ABSENT`, which absent.py gives).
Python 3.6 syntax at most: the interpreter is the host's own.
"""

_ABSENT = ()


def _start() -> None:
    import os
    import sys

    path = sys.argv[1]
    sys.modules.update(dict.fromkeys(_ABSENT))
    del sys.argv[0]
    sys.path.append(os.getcwd())
    # What was printed before a timeout is worth having.
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    main = sys.modules["__main__"]
    for name in ("_start", "_ABSENT"):
        main.__dict__.pop(name, None)
    main.__file__ = path
    try:
        with open(path, "rb") as file:
            code = compile(file.read(), path, "exec", dont_inherit=True)
        exec(code, main.__dict__)
    except SystemExit:
        raise
    except BaseException as error:
        # As the interpreter would, but without this frame in the traceback.
        own_frame = error.__traceback__
        error.__traceback__ = own_frame.tb_next if own_frame else None
        sys.excepthook(type(error), error, error.__traceback__)
        if isinstance(error, KeyboardInterrupt):
            import signal

            sys.stdout.flush()
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
            sys.exit(128 + signal.SIGINT)  # it is blocked
        sys.exit(1)


if __name__ == "__main__":
    _start()
