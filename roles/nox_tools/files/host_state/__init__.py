# nox-debug runs this package, as root, and so do the state check and `noxctl status`.
