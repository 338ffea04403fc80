"""comparison.json as a person reads it: in the terminal, in markdown, as a page, as a leaderboard."""
