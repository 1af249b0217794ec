"""The tests. A package, since torch-fidelity installs one of that name too."""
