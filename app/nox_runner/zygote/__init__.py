"""The fast backend: sandboxes made ahead of need by forking one prepared interpreter.

`nest`, `child` and `kernel` are run by the host's own /usr/bin/python3, inside. They import the
standard library and each other only. `pool`, `attempt` and `fast` are the runner's side.
"""
