"""How long iterations take and how sure that is: statistics over rounds, and how many rounds fit."""
