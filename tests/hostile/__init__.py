"""The hostile suite: what a hostile program or client tries, against any living Nox, over HTTP."""
