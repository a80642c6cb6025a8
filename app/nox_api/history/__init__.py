"""The history of runs, in a Git repository: the front hands records over, one process writes them.

`recorder` is the front's end, `routes` what clients see of it, `__main__` the process that owns the
repository, `repository` the repository itself, `prose` what `git log` tells of a run.
"""
