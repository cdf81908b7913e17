"""Published experiments at a size for two cores: one command each, from the runs to a table, a figure and a reading.

This room may import everything of attnlab; nothing imports it.
"""
