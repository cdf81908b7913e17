"""Compiles every Pallas kernel with the real compilers, without hardware, and tabulates what they say of it."""
