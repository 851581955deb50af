"""A small world that fits a laptop: PEMT's two stages, from a corpus to a table, in minutes."""
