"""The losses of Flash-DMD, one pure function per equation; no networks, no randomness, no state."""
