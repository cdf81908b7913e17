"""What is built from mixers: blocks and whole models."""
